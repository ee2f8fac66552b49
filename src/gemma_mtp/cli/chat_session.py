"""A conversation with a pair: its messages, and the answers that the pair gives to them.

All turns run in one engine, which keeps keys and values: a turn reads only what the turns before it have not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from gemma_mtp.chat.prompt import Conversation, chat_ids, thinking_variable
from gemma_mtp.chat.turn import Event, Thought
from gemma_mtp.decoding.draft_length import DraftTokens
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.engine import Engine
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.request import Generation, Request, Update
from gemma_mtp.engine.result import GenerationResult, TokenKind, token_kinds
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import PromptError, TokenizerError
from gemma_mtp.tokenizer import Tokenizer

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer, and how the token came about."""

    text: str
    thought: bool
    kind: TokenKind


class Session:
    """A conversation: `system` and `messages`, which alternate between the user's and the model's.

    A last message of the user's waits for its answer. `thinking` says whether the model is asked to think first, `seed`
    what the next answer is drawn with. Raises TokenizerError for a pair without a chat template, EngineError where the
    memory does not hold `context` tokens.
    """

    def __init__(
        self, pair: Pair, params: SamplingParams, draft_tokens: DraftTokens = "auto", verification: str = "exact",
        context: int | None = None,
    ) -> None:  # fmt: skip
        if pair.tokenizer is None or pair.tokenizer.chat_template is None:
            raise TokenizerError(
                "chat needs a target with a chat template, and this one has none; give --target a model that is trained"
                " for conversations, or complete text with: gemma-mtp generate"
            )
        self.tokenizer: Tokenizer = pair.tokenizer
        self._verification = cast(Verification, verification)
        pair.check(params, draft_tokens, self._verification)
        self._draft_tokens = draft_tokens
        self._params = replace(params, apart=bool(self.tokenizer.marks.ids))
        self._engine = Engine(pair, EngineSettings(max_running=1, max_tokens=context))
        self.system: str | None = None
        self.messages: Messages = []
        self.thinking = False
        self.seed = params.seed

    @property
    def context(self) -> int:
        """Most tokens of the prompt and its answer together."""
        return self._engine.max_tokens

    @property
    def greedy(self) -> bool:
        """Whether another seed gives no other answer."""
        return self._params.temperature == 0

    @property
    def can_think(self) -> bool:
        return thinking_variable(self.tokenizer) is not None

    @property
    def waiting(self) -> bool:
        """Whether the last message has no answer yet."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    @property
    def last_message(self) -> str | None:
        """The user's last one."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), None)

    def say(self, text: str) -> None:
        """Add a message of the user's. It takes the place of one that got no answer."""
        if self.waiting:
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})

    def take_back_answer(self) -> None:
        """The last message waits again."""
        if self.messages and not self.waiting:
            self.messages.pop()

    def drop(self, turns: int = 1) -> int:
        """Leave out the oldest turns, but for the last one. Returns how many."""
        begins = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        dropped = min(turns, max(0, len(begins) - 1))
        if dropped:
            del self.messages[: begins[dropped]]
        return dropped

    def answer(self) -> Answer:
        """Begin to answer the last message. Raises PromptError where the conversation is too long, and TokenizerError
        where the template refuses it; the message waits on."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        switch = thinking_variable(self.tokenizer)
        variables = {switch: True} if self.thinking and switch is not None else {}
        prompt = chat_ids(Conversation([*before, *self.messages], variables=variables), self.tokenizer)
        if len(prompt) >= self.context:
            raise PromptError(
                f"the conversation has {len(prompt)} tokens, but at most {self.context - 1} leave room for an answer;"
                " leave out the oldest turn with /drop, and send the message again with /retry, or begin anew with"
                " /reset."
            )
        params = replace(self._params, seed=self.seed)
        generation = self._engine.submit(Request(prompt, params, self._draft_tokens, self._verification))
        return Answer(self._engine, generation, self._keep)

    def _keep(self, text: str, thought: str) -> None:
        reasoning = {"reasoning_content": thought} if thought else {}
        self.messages.append({"role": "assistant", "content": text, **reasoning})


class Answer:
    """One answer, whose pieces are read once; when they end, it is in the conversation, and `result` is whole."""

    def __init__(self, engine: Engine, generation: Generation, keep: Callable[[str, str], None]) -> None:
        self._engine, self._generation, self._keep = engine, generation, keep
        generation.leave_out_text()
        self._reader = generation.result.turn_reader()

    @property
    def result(self) -> GenerationResult:
        return self._generation.result

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens earlier turns had read."""
        return self._generation.cached_tokens

    @property
    def fills_context(self) -> bool:
        """Whether there is no room for another token after it."""
        return len(self.result.prompt_token_ids) + len(self.result.token_ids) >= self._engine.max_tokens

    def pieces(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Piece]:
        """What each token adds. Once `stopped`, which is asked after every step, what was said stays."""
        said: dict[bool, list[str]] = {False: [], True: []}
        for piece in self._pieces(stopped):
            said[piece.thought].append(piece.text)
            yield piece
        self._keep("".join(said[False]), "".join(said[True]))

    def _pieces(self, stopped: Callable[[], bool]) -> Iterator[Piece]:
        while not self._generation.ended:
            self._engine.step()
            for update in self._generation.take():
                yield from self._read(update)
            if stopped() and not self._generation.ended:
                self._generation.cancel()

    def _read(self, update: Update) -> Iterator[Piece]:
        """The pieces of a round, token by token."""
        first = len(self.result.rounds) == 1
        kinds = token_kinds(update.round, first) if update.round is not None else []
        for token_id, kind in zip(update.token_ids, kinds, strict=True):
            yield from _pieces_of(self._reader.push([token_id]), kind)
        if update.finish_reason is not None:
            yield from _pieces_of(self._reader.push([], last=True), kinds[-1] if kinds else "plain")


def _pieces_of(events: list[Event], kind: TokenKind) -> Iterator[Piece]:
    for event in events:
        text = getattr(event, "text", "")  # no tools are named, so that calls are text
        if text:
            yield Piece(text, isinstance(event, Thought), kind)
