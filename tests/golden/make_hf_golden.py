#!/usr/bin/env python3
"""Golden logits of Hugging Face transformers for small random LLaMA models (README.md beside this file).

  make_hf_golden.py                              hf/<case>/{config.json, model.safetensors, tokens.bin, logits.bin},
                                                 hf/tokenizer.json
  make_hf_golden.py --check                      a second reader, numpy in float64, against what lies in hf/
  make_hf_golden.py --books MODELS --text FILE   books.json, from MODELS/books-5m and MODELS/books-46m

The logits are transformers' LlamaForCausalLM on the rounded weights of model.safetensors, upcast to float64.  Two things
stay float32 inside transformers whatever the model's dtype: RMSNorm's x / rms(x), and RoPE's angle, cos and sin.  What
that costs is the column `exact` of --check.
"""
import argparse, copy, hashlib, json, math, os, re, shutil, struct, sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"          # a sum split over threads may round differently
os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np

HERE = Path(__file__).resolve().parent
HF = HERE / "hf"
N_TOKENS = 80                                # one cache block of 64 tokens, and 16 of the next
BOS, EOS = 0, 1
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}   # 64, not 8192: the scaling then acts within 80 tokens


def case(D, Hq, Hkv, d, F, V, dtype, tied=True, theta=10000.0, scaling=None, eps=1e-5, dialect="classic", L=2):
    return dict(D=D, Hq=Hq, Hkv=Hkv, d=d, F=F, V=V, dtype=dtype, tied=tied, theta=theta, scaling=scaling, eps=eps,
                dialect=dialect, L=L)


# G = Hq/Hkv.  Hkv > 1 almost everywhere: with one kv head every mapping of heads is the same.
# V 64 is the tokenizer's size; V above it has rows that no text reaches; 67 is odd, the tail of any unrolled loop.
CASES = {
    "gqa1_d8":         case(D=32, Hq=4,  Hkv=4, d=8,   F=64, V=67, dtype="float32"),
    "gqa2_d48":        case(D=32, Hq=4,  Hkv=2, d=48,  F=40, V=64, dtype="float16"),
    "gqa3_d64":        case(D=24, Hq=6,  Hkv=2, d=64,  F=48, V=64, dtype="bfloat16"),
    "gqa4_d96":        case(D=16, Hq=8,  Hkv=2, d=96,  F=48, V=80, dtype="float16", theta=1e6),
    "gqa8_d128":       case(D=16, Hq=8,  Hkv=1, d=128, F=48, V=64, dtype="bfloat16"),
    "gqa8_d8":         case(D=32, Hq=16, Hkv=2, d=8,   F=48, V=64, dtype="bfloat16"),
    "llama31_scaling": case(D=32, Hq=4,  Hkv=2, d=64,  F=48, V=64, dtype="bfloat16", theta=5e5, scaling=LLAMA31),
    "llama31_v5":      case(D=32, Hq=4,  Hkv=2, d=16,  F=48, V=64, dtype="bfloat16", theta=5e5, scaling=LLAMA31,
                            tied=False, dialect="v5"),           # config.json as transformers 5 writes it
    "untied":          case(D=32, Hq=2,  Hkv=2, d=16,  F=48, V=80, dtype="float32", tied=False, eps=1e-3),
    "f16":             case(D=32, Hq=4,  Hkv=2, d=8,   F=64, V=64, dtype="float16", dialect="no_head_dim"),
    "bf16":            case(D=32, Hq=4,  Hkv=2, d=8,   F=64, V=64, dtype="bfloat16", dialect="no_head_dim"),
    "head_dim_apart":  case(D=48, Hq=4,  Hkv=2, d=16,  F=40, V=72, dtype="float32"),     # Hq*d = 64, D = 48
}


def case_seed(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- writing hf/

def classic_config(c):
    """The dialect of published checkpoints: rope_theta and rope_scaling at the top level, torch_dtype."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c["D"],
              "intermediate_size": c["F"], "num_hidden_layers": c["L"], "num_attention_heads": c["Hq"],
              "num_key_value_heads": c["Hkv"], "head_dim": c["d"], "vocab_size": c["V"], "max_position_embeddings": 128,
              "rms_norm_eps": c["eps"], "rope_theta": c["theta"], "rope_scaling": c["scaling"], "hidden_act": "silu",
              "tie_word_embeddings": c["tied"], "torch_dtype": c["dtype"], "bos_token_id": BOS, "eos_token_id": EOS,
              "attention_bias": False, "mlp_bias": False}
    if c["dialect"] == "no_head_dim":                # Llama 2: head_dim is hidden_size / num_attention_heads
        del config["head_dim"]
    if c["scaling"] is None:
        del config["rope_scaling"]
    return config


def fill(model, torch):
    """Random weights under which every part shows in the logits: with unit-size rows out of the norms, attention scores
    have a standard deviation near 2 (neither flat nor one-hot), attention and FFN each add about as much as the row
    they are added to, and no norm weight is near enough to 1 to be forgotten."""
    scale = {"q_proj": 1.4, "k_proj": 1.4, "v_proj": 1.0, "o_proj": 1.5, "gate_proj": 1.5, "up_proj": 1.0,
             "down_proj": 1.0, "lm_head": 3.0}
    with torch.no_grad():
        for name, w in model.named_parameters():
            kind = name.split(".")[-2]
            if w.dim() == 1:
                w.uniform_(0.5, 1.5)
            elif kind == "embed_tokens":
                w.normal_(0.0, 0.5)
            else:
                w.normal_(0.0, scale[kind] / math.sqrt(w.shape[1]))


def make_case(name, c, torch, LlamaConfig, LlamaForCausalLM):
    folder = HF / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = getattr(torch, c["dtype"])

    dropped = ("architectures", "model_type", "torch_dtype")
    config = LlamaConfig(**{k: copy.deepcopy(v) for k, v in classic_config(c).items() if k not in dropped})   # it edits v
    torch.manual_seed(case_seed(name))
    model = LlamaForCausalLM(config)
    fill(model, torch)
    model.to(dtype).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if c["dialect"] != "v5":
        write_json(folder / "config.json", classic_config(c))

    ids = torch.randint(2, c["V"], (N_TOKENS,))      # BOS, then anything but BOS and EOS
    ids[0] = BOS
    folder.joinpath("tokens.bin").write_bytes(ids.numpy().astype("<i4").tobytes())

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").double().eval()
    assert model.model.rotary_emb.original_inv_freq.shape[0] == c["d"] // 2
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    assert logits.dtype == torch.float64 and logits.shape == (N_TOKENS, c["V"])
    folder.joinpath("logits.bin").write_bytes(logits.numpy().astype("<f4").tobytes())
    print(f"{name:16} {sum(p.numel() for p in model.parameters()):7d} parameters, "
          f"{sum(f.stat().st_size for f in folder.iterdir()):7d} bytes, logits rms {logits.square().mean().sqrt():.3f}")


def make_tokenizer():
    """Byte-level BPE without merges: two special tokens and 62 characters (space is U+0120, newline U+010A).  Other
    characters have no id; transformers drops them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders, processors, AddedToken
    chars = "\u0120\u010aabcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()_ABCDEHILMSTW"
    assert len(set(chars)) == len(chars) == 62, len(chars)
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + list(chars))}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert tokenizer.get_vocab_size() == 64 == min(c["V"] for c in CASES.values())
    text = "It is 10 to 12:\nsaid (he)."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text and len(tokenizer.encode(text).ids) == len(text)
    assert tokenizer.encode("aZ\u00e9b").ids == tokenizer.encode("ab").ids
    tokenizer.save(str(HF / "tokenizer.json"))


def make_hf():
    torch, LlamaConfig, LlamaForCausalLM = import_hf()
    HF.mkdir(exist_ok=True)
    for name, c in CASES.items():
        make_case(name, c, torch, LlamaConfig, LlamaForCausalLM)
    make_tokenizer()


def import_hf():
    import torch, transformers
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", file=sys.stderr)
    return torch, transformers.LlamaConfig, transformers.LlamaForCausalLM


# ---------------------------------------------------------------- the second reader

def read_safetensors(path):
    """Every tensor in float64; shares no code with the writer."""
    raw = path.read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, t in json.loads(raw[8:8 + n]).items():
        if name == "__metadata__":
            continue
        data = raw[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]
        if t["dtype"] == "BF16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[t["dtype"]])
        tensors[name] = values.astype(np.float64).reshape(t["shape"])
    return tensors


def frequencies(config, scaled=True):
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    w = rope["rope_theta"] ** (-2.0 * np.arange(d // 2) / d)
    if scaled and rope.get("rope_type") == "llama3":
        turns = rope["original_max_position_embeddings"] * w / (2 * math.pi)     # in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)                   # 1: unchanged, 0: slowed by factor
        w = keep * w + (1 - keep) * w / rope["factor"]
    return w


def reference(config, W, ids, fault=""):
    """Logits (N, V) in float64.  `fault` breaks one thing, to see whether the golden logits would show it."""
    D, L = config["hidden_size"], config["num_hidden_layers"]
    Hq, Hkv = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or D // Hq
    N, G = len(ids), Hq // Hkv
    half = lambda a: a.astype(np.float16).astype(np.float64)
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"] * (fault != "eps0")) * \
        (1.0 if fault == "norm_weight" else w)
    angle = np.arange(N)[:, None] * frequencies(config, fault != "no_scaling")   # (N, d/2)
    if fault == "no_rope":
        angle = angle * 0
    cos, sin = np.cos(angle), np.sin(angle)

    def rope(x):                                                                 # (H, N, d)
        y = np.empty_like(x)
        a, b = (slice(0, None, 2), slice(1, None, 2)) if fault == "interleaved" else (slice(0, d // 2), slice(d // 2, d))
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., b] * cos + x[..., a] * sin
        return y

    heads = lambda x, H: x.reshape(N, H, d).transpose(1, 0, 2)
    row, column = np.arange(N)[:, None], np.arange(N)
    seen = column <= row
    if fault == "lost_block":                        # rows of the second block do not see the last token of the first
        seen = seen & ~((row >= 64) & (column == 63))
    kv_head = np.arange(Hq) % Hkv if fault == "gqa_mod" else np.arange(Hq) // G
    x = W["model.embed_tokens.weight"][ids]
    for i in range(L):
        w = lambda name: W[f"model.layers.{i}.{name}.weight"]
        xn = norm(x, w("input_layernorm"))
        q = rope(heads(xn @ w("self_attn.q_proj").T, Hq))
        k = rope(heads(xn @ w("self_attn.k_proj").T, Hkv))
        v = heads(xn @ w("self_attn.v_proj").T, Hkv)
        if fault == "kv_f16":
            k, v = half(k), half(v)
        s = q @ k[kv_head].transpose(0, 2, 1) / math.sqrt(D / Hq if fault == "scale_D" else d)
        p = np.exp(np.where(seen, s - np.where(seen, s, -np.inf).max(-1, keepdims=True), -np.inf))
        y = (p / p.sum(-1, keepdims=True)) @ v[kv_head]
        x = x + y.transpose(1, 0, 2).reshape(N, Hq * d) @ w("self_attn.o_proj").T
        xn = norm(x, w("post_attention_layernorm"))
        gate = xn @ w("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (xn @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    unembed = W["model.embed_tokens.weight" if config["tie_word_embeddings"] or fault == "tied" else "lm_head.weight"]
    return norm(x, W["model.norm.weight"]) @ unembed.T


FAULTS = ["kv_f16", "no_rope", "interleaved", "gqa_mod", "norm_weight", "lost_block", "eps0", "no_scaling", "scale_D",
          "tied"]


def check():
    """Per case: rms of the logits; the largest |numpy - golden|, once with numpy in float64 throughout (`exact`) and once
    with rotated K and V rounded to float16 (`f16 max`); then, for every fault, the rms of its change over the rms of the
    logits ('-': the fault changes nothing in this case)."""
    print(f"{'case':15} {'rms':>5} {'exact':>7} {'f16 max':>7}" + "".join(f" {f:>11}" for f in FAULTS))
    worst = 0.0
    for name, c in CASES.items():
        folder = HF / name
        config, W = json.loads((folder / "config.json").read_text()), read_safetensors(folder / "model.safetensors")
        ids = np.fromfile(folder / "tokens.bin", "<i4")
        golden = np.fromfile(folder / "logits.bin", "<f4").reshape(N_TOKENS, c["V"]).astype(np.float64)
        rms = lambda a: math.sqrt((a * a).mean())
        exact, f16 = (np.abs(reference(config, W, ids, f) - golden).max() for f in ("", "kv_f16"))
        worst = max(worst, exact / rms(golden))
        change = [rms(reference(config, W, ids, f) - golden) / rms(golden) for f in FAULTS]
        print(f"{name:15} {rms(golden):5.3f} {exact:7.1e} {f16:7.1e}" +
              "".join(f" {x:11.1e}" if x > 1e-5 else f" {'-':>11}" for x in change))
    # A float32 angle near 79 rad is off by up to 79 * 2^-24 (frequency) + 2^-18 (product) = 9e-6 rad, in scores of a few.
    if worst > 3e-5:
        sys.exit(f"the second reader differs from the golden logits by {worst:.1e} of their rms, expected below 3e-5")


# ---------------------------------------------------------------- books.json

POSITIONS, N_PROMPT, N_WINDOWS = [0, 10, 63, 64, 95], 96, 20


def make_books(models, text):
    torch, _, LlamaForCausalLM = import_hf()
    import sentencepiece
    sha = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()
    f32 = lambda x: float(np.format_float_positional(np.float32(x), unique=True, trim="0"))
    out = {"text": {"name": text.name, "sha256": sha(text)}}
    for name, window, with_nll in (("books-5m", 1023, True), ("books-46m", 4095, False)):
        folder = models / name
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        ids = pieces.encode(text.read_text(encoding="utf-8"))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        prompt = [pieces.bos_id()] + ids[:N_PROMPT - 1]
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
        top = []
        for p in POSITIONS:
            value, index = logits[p].topk(5)
            top.append({"position": p, "ids": index.tolist(), "logits": [f32(v) for v in value]})
        out[name] = {"sha256": sha(folder / "model.safetensors"), "text_tokens": len(ids), "prompt": prompt, "top5": top}
        if with_nll:      # windows of the text's tokens, BOS before each, every token scored
            total, count = 0.0, 0
            with torch.no_grad():
                for i in range(N_WINDOWS):
                    row = torch.tensor([pieces.bos_id()] + ids[i * window:(i + 1) * window])
                    logp = model(row[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
                    total -= logp.gather(1, row[1:, None]).sum().item()
                    count += len(row) - 1
            out[name].update({"nll_window": window, "nll_tokens": count, "nll_first_20_windows": round(total / count, 6)})
            print(name, "mean nll", total / count, "ppl", math.exp(total / count), "over", count, "tokens")
    lines = json.dumps(out, indent=1)
    lines = re.sub(                                  # lists of numbers on one line
        r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", lines)
    assert json.loads(lines) == out
    (HERE / "books.json").write_text(lines + "\n")


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--check", action="store_true", help="compare hf/ with the second reader, write nothing")
    args.add_argument("--books", type=Path, metavar="MODELS", help="folder that holds books-5m and books-46m")
    args.add_argument("--text", type=Path, metavar="FILE", help="the validation text")
    a = args.parse_args()
    if a.check:
        check()
    elif a.books or a.text:
        if not (a.books and a.text):
            args.error("--books and --text go together")
        make_books(a.books, a.text)
    else:
        make_hf()
