"""Let a folder of Hugging Face go on from prompts: `python -m elastic.generate FOLDER --prompt TEXT`, for a look."""

import argparse
import json
import sys
from typing import Any

import torch

from elastic.errors import ConfigError, SolventError

_WRONG_INPUT = 2


def generate(
    folder: str, prompts: list[str], *, max_tokens: int, temperature: float, is_raw: bool
) -> list[dict[str, str]]:
    """Return each prompt with what the model writes; the likeliest token each time where the temperature is 0.

    Args:
        is_raw: prompts are text to go on from, even if the model has a chat template.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 # not everybody needs it
    except ImportError as error:
        raise ConfigError(
            "generate runs models through transformers, which is not installed. pip install 'transformers>=5'"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device == "cuda" else None)
    model.to(device).eval()
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    rows: list[dict[str, str]] = []
    for prompt in prompts:
        if tokenizer.chat_template and not is_raw:
            turns = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"].to(device)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, **sampling)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": prompt, "answer": answer})
    return rows


def main() -> int:
    """Print what the model writes."""
    parser = argparse.ArgumentParser(prog="python -m elastic.generate")
    parser.add_argument("folder")
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--raw", action="store_true")
    args = parser.parse_args()
    how = {"max_tokens": args.max_tokens, "temperature": args.temperature, "is_raw": args.raw}
    try:
        rows = generate(args.folder, args.prompt, **how)
    except SolventError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return _WRONG_INPUT
    print(json.dumps(rows))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
