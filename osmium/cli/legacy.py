"""Flags and values of earlier engines' command lines, and what to use instead of each.

Krasis and Osmium up to 0.3 had these.  Flags that keep their name and meaning are not listed.
"""

__all__ = ["FLAGS", "VALUES", "instead"]

FLAGS: dict[str, str] = {
    "--config": "is not supported; give the settings as flags, or in a shell alias.",
    "--num-gpus": "is not supported; Osmium uses one GPU. Omit the flag.",
    "--selected-gpus": "is not supported; choose a GPU with CUDA_VISIBLE_DEVICES=0.",
    "--pp-partition": "is not supported; Osmium uses one GPU. Omit the flag.",
    "--multi-gpu-hcs": "is not supported; Osmium uses one GPU. Omit the flag.",
    "--heatmap-path": "is not needed; usage counts are kept in the cache folder (--cache-dir).",
    "--vram-safety-margin": "is not supported; limit VRAM with --vram, as in --vram 22G.",
    "--stream-attention": "is not supported; --attention-quant int4 makes attention smaller.",
    "--no-stream-attention": "is not needed; attention weights always stay in VRAM. Omit the flag.",
    "--force-load": "is not supported; set the host memory to use with --ram, as in --ram 64G.",
    "--force-rebuild-cache": "is not needed; a checkpoint that changed is packed again. "
    "`osmium rm NAME` removes a packed model.",
    "--build-cache": "is a command now: osmium pack MODEL.",
    "--draft-model": "is not supported; there is no speculative decoding yet. Omit the flag.",
    "--draft-k": "is not supported; there is no speculative decoding yet. Omit the flag.",
    "--draft-context": "is not supported; there is no speculative decoding yet. Omit the flag.",
    "--dense-mlp-quant": "is not needed; the supported models have no dense MLP layers. "
    "Omit the flag.",
    "--stress-test": "is not supported; `osmium bench MODEL --parallel 4` measures under load.",
    "--perplexity": "is a command now: osmium perplexity MODEL --text FILE.",
    "--vram-report": "is not needed; `osmium plan MODEL` prints where VRAM goes, and GET /metrics "
    "counts it.",
    "--note": "is not supported; keep notes beside the JSON that `osmium bench` prints.",
    "--enable-thinking": "is not a server flag; requests set it (chat_template_kwargs), and "
    "`osmium run` and `osmium chat` have --think.",
    "--session-enabled": "is not supported; the OpenAI API needs no sessions. Omit the flag.",
    "--test-endpoints": "is not supported; `osmium logits` writes logits to a file.",
    "--krasis-threads": "is not needed; Osmium chooses the number of threads. Omit the flag.",
    "--cpu-expert-bits": "is not supported; experts have one format: --gpu-expert-bits 4.",
    "--gguf-path": "is not supported; give a folder or hub id of safetensors, as in "
    "--model-path Qwen/Qwen3.5-35B-A3B.",
    "--layer-group-size": "is not needed; experts are copied one by one. Omit the flag.",
    "--gpu-prefill-threshold": "is not needed; all prompts are computed on the GPU. Omit the flag.",
    "--gpu-decode": "is not needed; a GPU is used if there is one (--device). Omit the flag.",
    "--benchmark-suite": "is not supported; `osmium bench MODEL` measures one model.",
    "--non-interactive": "is not needed; only `osmium chat` asks for input. Omit the flag.",
    "--sanitytest": "is not supported; `osmium run MODEL PROMPT` shows an answer.",
}
"""The rest of the error message, after the flag."""

VALUES: dict[str, dict[str, str]] = {
    "--attention-quant": {
        "awq": "is not supported yet; use --attention-quant int4 (4 bits without calibration).",
        "hqq4": "is not supported; use --attention-quant int4.",
        "hqq6": "is not supported; use --attention-quant int8.",
        "hqq8": "is not supported; use --attention-quant int8.",
        "fp8": "is not supported; use --attention-quant int8.",
        "nvfp4": "is not supported; use --attention-quant int4.",
    },
    "--shared-expert-quant": {"awq": "is not supported; use --shared-expert-quant int4."},
    "--lm-head-quant": {"awq": "is not supported; use --lm-head-quant int4."},
    "--kv-dtype": {
        "polar4": "is not supported; use --kv-dtype fp8_e4m3 (1 byte per value).",
        "fp8": "has a longer name: --kv-dtype fp8_e4m3.",
        "fp8_e5m2": "is not supported; use --kv-dtype fp8_e4m3.",
        "int8": "is not supported; use --kv-dtype fp8_e4m3.",
        "q8_0": "is not supported; use --kv-dtype fp8_e4m3.",
        "q4_0": "is not supported; use --kv-dtype fp8_e4m3.",
        "f16": "is not supported; use --kv-dtype bf16.",
        "fp16": "is not supported; use --kv-dtype bf16.",
    },
    "--gpu-expert-bits": {
        bits: f"is not supported; use --gpu-expert-bits {near}."
        for bits, near in (("2", 4), ("3", 4), ("5", 4), ("6", 8))
    },
    "--device": {
        "cuda": "has another name: --device gpu.",
        "cuda:0": "has another name: --device gpu (CUDA_VISIBLE_DEVICES=0 chooses the GPU).",
    },
}
"""By flag and value: the rest of the error message, after the value."""


def instead(flag: str) -> str | None:
    """The rest of an earlier flag's error message, after its name; None for other flags."""
    if flag in FLAGS:
        return FLAGS[flag]
    positive = flag.replace("--no-", "--", 1)
    return FLAGS.get(positive)
