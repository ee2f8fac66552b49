"""What vLLM makes of a recipe's arguments, and its tokens: `run_vllm.py ARGUMENTS PROMPTS COUNT`, lists as JSON."""

import json
import sys
from dataclasses import replace

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

arguments, prompts, count = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments)
args = replace(EngineArgs.from_cli_args(parsed), dtype="float32", enforce_eager=True, disable_log_stats=False)
llm = LLM.from_engine_args(args)
params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
made = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
speculative = llm.llm_engine.vllm_config.speculative_config
print(json.dumps({
    "drafted": [list(output.outputs[0].token_ids) for output in made],
    "method": speculative.method, "draft_tokens": speculative.num_speculative_tokens,
    "drafts": counted["vllm:spec_decode_num_draft_tokens"],
    "accepted": counted["vllm:spec_decode_num_accepted_tokens"],
}))  # fmt: skip
