"""Print the log-probabilities of a prompt in vLLM, run by the Python of vLLM's own environment: nothing of ours here.

Arguments: the exported folder; a file with the prompt's token ids as JSON; the file to write, which gets for each token
but the first a mapping of token ids to log-probabilities.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

model, prompt, written = sys.argv[1:]
engine = LLM(model, dtype="float32", enforce_eager=True, enable_prefix_caching=False)
sampling = SamplingParams(max_tokens=1, prompt_logprobs=20)
(answer,) = engine.generate({"prompt_token_ids": json.loads(Path(prompt).read_text())}, sampling)
found = [{token: one.logprob for token, one in place.items()} for place in answer.prompt_logprobs[1:]]
Path(written).write_text(json.dumps(found))
