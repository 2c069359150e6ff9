"""Continue a text with an exported model, with nothing but transformers: `generate.py FOLDER TEXT`."""

import sys

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, text: str) -> None:
    """Print the text and what the model makes of it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    found = model.generate(tokens, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40, repetition_penalty=1.2)
    print(tokenizer.decode(found[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
