"""Train the demo model that the project carries in `demo/model`, and write it in the hub's format.

    python scripts/demo_text.py --out demo-train                       # the text, from Python's standard library
    python scripts/train_demo.py --data demo-train --out demo-new --device cuda --minutes 3

AdamW under a cosine schedule (over the minutes or the steps given), BF16 autocast on a GPU, FP32 on the CPU; the
router is balanced without an auxiliary loss, by moving `e_score_correction_bias` against the sign of each expert's
excess load (DeepSeek-V3, arXiv 2412.19437). The last third trains on windows of the whole context. `--out` gets the
checkpoint (two shards), its tokenizer and `training.json`, which says how it was made and what it reached.
"""

import argparse
import inspect
import json
import math
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_net import CONFIG, DemoNet, hub_tensors
from safetensors.torch import load_file, save_file

CODE_SHARE = 0.7
BALANCE_RATE = 4e-3
WARM_UP = 0.03  # of the whole training
EVAL_WINDOW = 2048


def load_tokens(data: Path, device: str) -> dict[str, torch.Tensor]:
    """Training token ids, one long stream a domain."""
    streams = {}
    for domain in ("code", "prose"):
        ids = np.fromfile(data / f"train-{domain}.bin", dtype="<u2")
        streams[domain] = torch.from_numpy(ids.astype(np.int32)).to(device)
    return streams


def held_out(data: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """Domain → (windows [W, EVAL_WINDOW] of the evaluation text, bytes of text a token)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    windows = {}
    for path in sorted((data / "text" / "eval").glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        ids = [
            i for e in tokenizer.encode_batch(texts) for i in (CONFIG["bos_token_id"], *e.ids, CONFIG["eos_token_id"])
        ]
        count = len(ids) // EVAL_WINDOW
        size = sum(len(t.encode()) for t in texts) / len(ids)
        windows[path.stem] = torch.tensor(ids[: count * EVAL_WINDOW]).view(count, EVAL_WINDOW), size
    return windows


def sample(streams: dict[str, torch.Tensor], batch: int, window: int, gen: torch.Generator) -> torch.Tensor:
    """[batch, window + 1] ids: random windows, code and prose by CODE_SHARE."""
    n_code = round(batch * CODE_SHARE)
    parts = []
    for stream, n in ((streams["code"], n_code), (streams["prose"], batch - n_code)):
        start = torch.randint(len(stream) - window - 1, (n, 1), generator=gen).to(stream.device)
        parts.append(stream[start + torch.arange(window + 1, device=stream.device)])
    return torch.cat(parts).long()


def loss_of(net: DemoNet, ids: torch.Tensor) -> torch.Tensor:
    logits = net(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def optimizer_for(net: DemoNet, lr: float, device: str) -> torch.optim.Optimizer:
    """AdamW; vectors, gates' constants and the embedding are not decayed."""
    groups = {True: [], False: []}
    for name, p in net.named_parameters():
        groups[p.dim() >= 2 and not name.endswith(("A_log", "embed_tokens.weight", "conv1d.weight"))].append(p)
    params = [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), fused=device.startswith("cuda"))


def balance(net: DemoNet, rate: float) -> None:
    """Make overloaded experts less and idle ones more likely to be chosen."""
    for gate in net.gates():
        gate.e_score_correction_bias -= rate * (gate.load - gate.load.mean()).sign()


def train(net: DemoNet, streams: dict[str, torch.Tensor], args: argparse.Namespace) -> dict:
    """The loop. Returns what to record of it."""
    device = args.device
    gen = torch.Generator().manual_seed(args.seed)
    optimizer = optimizer_for(net, args.lr, device)
    start, step, tokens, shown = time.time(), 0, 0, time.time()
    while True:
        spent = time.time() - start
        progress = step / args.steps if args.steps else spent / (60 * args.minutes)
        if progress >= 1:
            break
        lr = args.lr * min(1.0, progress / WARM_UP + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        window = CONFIG["model_max_length"] if progress > 2 / 3 else args.window
        ids = sample(streams, max(2, args.batch_tokens // window), window, gen)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            loss = loss_of(net, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            balance(net, BALANCE_RATE * (1 - progress))
        step, tokens = step + 1, tokens + ids[:, 1:].numel()
        if step % 50 == 0 or time.time() - shown > 20 or step in (1, 10):
            shown = time.time()
            rate = tokens / (shown - start)
            print(
                f"step {step:5d}  {progress:6.1%}  loss {loss.item():.3f}  lr {lr:.2e}  {rate:,.0f} tokens/s",
                flush=True,
            )
    return {"steps": step, "tokens": tokens, "seconds": round(time.time() - start), "final_train_loss": loss.item()}


@torch.no_grad()
def evaluate(net: DemoNet, streams: dict[str, torch.Tensor], windows: dict, device: str) -> dict:
    """Held-out loss (nats a token) by domain, beside a unigram model's, and each expert's share of the choices."""
    counts = sum(torch.bincount(s.cpu(), minlength=CONFIG["vocab_size"]) for s in streams.values()) + 1
    unigram = -(counts / counts.sum()).log()
    used = [torch.zeros(CONFIG["num_experts"]) for _ in net.gates()]
    result = {}
    for domain, (ids, size) in windows.items():
        losses = []
        for window in ids:
            losses.append(loss_of(net, window[None].to(device)).item())
            for total, gate in zip(used, net.gates(), strict=True):
                total += gate.load.cpu()
        loss = sum(losses) / len(losses)
        result[domain] = {
            "loss": round(loss, 4),
            "bits_per_byte": round(loss / math.log(2) / size, 4),
            "unigram_loss": round(unigram[ids].mean().item(), 4),
            "windows": len(ids),
        }
    shares = [[round(x, 4) for x in (u / u.sum()).tolist()] for u in used]
    return {"held_out": result, "expert_share_by_moe_layer": shares}


def export(net: DemoNet, data: Path, out: Path) -> None:
    """Write the checkpoint: two shards, cut between layers, with their index, config and tokenizer."""
    tensors = hub_tensors(net)
    cut = next(i for i, name in enumerate(tensors) if name.startswith("model.layers.3."))
    names = list(tensors)
    weight_map = {}
    for s, part in enumerate((names[:cut], names[cut:]), start=1):
        file = f"model-{s:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(out / "config.json", CONFIG)
    ids = {k: CONFIG[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", ids)
    specials = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    settings = {"model_max_length": CONFIG["model_max_length"], "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | specials | settings)
    shutil.copy(data / "tokenizer.json", out / "tokenizer.json")


def write_json(path: Path, obj) -> None:
    path.write_text(json.dumps(obj, indent=1) + "\n")


@torch.no_grad()
def round_to_export(net: DemoNet, out: Path) -> None:
    """Take the exported values back, so that what is measured from here on is what was written."""
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    for name, p in net.state_dict().items():
        if ".experts." in name:
            prefix, role = name.rsplit(".", 1)
            p.copy_(torch.stack([tensors[f"{prefix}.{e}.{role}.weight"] for e in range(len(p))]))
        else:
            p.copy_(tensors[name])


@torch.no_grad()
def against_transformers(net: DemoNet, out: Path, ids: torch.Tensor) -> torch.Tensor:
    """A position's largest difference of a logit [S], FP32 on the CPU, from transformers' model of the export."""
    from transformers import AutoModelForCausalLM
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    # Where flash-linear-attention is installed transformers calls its GPU kernel even on a CPU.
    modeling.chunk_kimi_delta_attention = inspect.unwrap(modeling.chunk_kimi_delta_attention)
    oracle = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return (net.cpu()(ids) - oracle(ids, use_cache=False).logits)[0].abs().amax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what demo_text.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long")
    length.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens a step (default %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens a window, at first (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    streams, windows = load_tokens(args.data, args.device), held_out(args.data)
    net = DemoNet(CONFIG).to(args.device)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters on {args.device}", flush=True)
    record = {"text": json.loads((args.data / "text.json").read_text())}
    record["training"] = {k: getattr(args, k) for k in ("batch_tokens", "window", "lr", "seed")}
    record["training"] |= {"device": device_name(args.device), "torch": torch.__version__}
    record["training"] |= train(net, streams, args)

    export(net, args.data, args.out)
    torch.set_float32_matmul_precision("highest")
    round_to_export(net, args.out)
    record["parameters"] = sum(p.numel() for p in net.parameters())
    record |= evaluate(net, streams, windows, args.device)
    write_json(args.out / "training.json", record)  # before the comparison, which needs transformers
    print(json.dumps(record, indent=1), flush=True)
    apart = against_transformers(net, args.out, windows["code"][0][:1, :200])
    print(f"|Δ logit| from transformers, largest of a position: median {apart.median():.2e}, all {apart.max():.2e}")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine() + " CPU"


if __name__ == "__main__":
    main()
