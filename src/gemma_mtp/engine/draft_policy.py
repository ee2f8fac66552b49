"""How many tokens the jobs of an engine draft: as asked for, or by what was learnt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gemma_mtp.decoding.draft_length import DraftLength, Plan
from gemma_mtp.decoding.params import ChoiceKind
from gemma_mtp.decoding.round_costs import RoundCosts
from gemma_mtp.engine.round import RoundOutput

#: policies by how rounds choose
Policies = dict[ChoiceKind, DraftLength]


@dataclass
class DraftPolicy:
    """The `auto` draft lengths of an engine.

    A lone job has policies of its own, which begin with what the newest ones learnt. Jobs that run together share one:
    each draft makes all of them wait, and what was accepted of the others' says at once what a new one's are worth.
    """

    costs: Callable[[ChoiceKind, int], RoundCosts]  # of rounds that choose so, of so many sequences together
    watches_drafts: bool
    latest: Policies = field(default_factory=dict)  # the newest of each kind; the pair keeps them for its next engine
    shared: Policies = field(default_factory=dict)
    sequences: int = 1  # that run together in the step under way
    _in_force: Policies = field(default_factory=dict)
    _plans: dict[ChoiceKind, Plan] = field(default_factory=dict)
    _planning: float = 0.0  # seconds that the step's plans took to make

    def begin_step(self, sequences: int) -> None:
        """Forget the last step's plans. `sequences`: how many run together."""
        self.sequences = sequences
        self._in_force, self._plans, self._planning = {}, {}, 0.0

    @property
    def planned(self) -> bool:
        """Returns whether the step under way has a plan of this policy's."""
        return bool(self._plans)

    def plan(self, choice: ChoiceKind, own: Policies) -> Plan:
        """Returns the plan of this step for jobs that choose so. `own`: the asking job's policies."""
        if choice not in self._plans:
            began = time.perf_counter()
            self._in_force[choice] = self._policy(choice, own)
            self._plans[choice] = self._in_force[choice].choose()
            self._planning += time.perf_counter() - began
        return self._plans[choice]

    def learn(self, choice: ChoiceKind, outputs: Sequence[RoundOutput], seconds: float, drafting: float) -> None:
        """Let the policy in force know what came of its plan.

        `seconds` of the step, and of drafting in it; 0 where others took part in it. What making its plans took is no
        part of what a length costs: lengths that are tried are those for which a plan is made anew, and the first plan
        of all waits for the costs to be measured.
        """
        if choice in self._in_force:
            self._in_force[choice].learn(outputs, max(0.0, seconds - self._planning), drafting)

    def _policy(self, choice: ChoiceKind, own: Policies) -> DraftLength:
        """Returns the policy to ask."""
        costs = self.costs(choice, batch_size(self.sequences))
        policies = self.shared if self.sequences > 1 else own
        if choice not in policies:
            policies[choice] = DraftLength(costs, early_stop=self.watches_drafts)
            if choice in self.latest:
                policies[choice].after(self.latest[choice])
            self.latest[choice] = policies[choice]
        policies[choice].use(costs, self.sequences)
        return policies[choice]


def batch_size(sequences: int) -> int:
    """Returns the number of sequences whose costs stand for so many: the next power of two."""
    return 1 << (sequences - 1).bit_length()
