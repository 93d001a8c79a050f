"""transformers' greedy `generate` for `sampling.py`: a line "batch prompt new" in, its seconds out."""

import sys
import time


def main(folder: str, dtype: str) -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"transformers is left out: {error}", file=sys.stderr)
        print("absent", flush=True)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    print(f"  transformers {transformers.__version__}, torch {torch.__version__}", file=sys.stderr)
    print("ready", flush=True)
    for line in sys.stdin:
        batch, prompt, new = map(int, line.split())
        ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        with torch.no_grad():
            text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = time.perf_counter() - start
        assert text.shape == (batch, prompt + new)
        print(seconds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
