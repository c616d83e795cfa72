"""Checks real Gemma weights: the tokenizer's ids, the perplexity of a paragraph, an answer to it.

    python check.py --weights path/to/gemma-3-1b-it         # or: python gemma.py --weights ...

The last line says PASS (exit code 0) or FAIL (exit code 1). The check cannot tell whether the
weights are the published ones.
"""

import sys

import jax
import jax.numpy as jnp
import tyro

import data
import gemma
import sampler

VOCABULARIES = {  # id of <start_of_turn> -> name, and texts whose ids transformers and others give
    106: ("Gemma 2", {
        "What is the capital of France?": [1841, 603, 573, 6037, 576, 6081, 235336]}),
    105: ("Gemma 3", {
        "don't can't": [13246, 236789, 236745, 740, 236789, 236745],
        "def f(x):\n    return x**2\n":
            [2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 1018, 236778, 107]}),
}
PARAGRAPH = (
    "Tom has 12 cards. He buys 7 more. Mia gives him 3 more. He puts the cards in 2 boxes. "
    "How many cards does each box hold?"
)
MAX_PERPLEXITY = 50.0  # random weights score about the vocabulary's size; no BOS, millions


def check_tokenizer(tok: data.Tokenizer, cfg: gemma.Config) -> None:
    """ValueError unless the ids are the published ones and the embedding has a row for each."""
    published = VOCABULARIES.get(tok.start_of_turn) if tok.vocab_size >= 256_000 else None
    name, golden = published or ("not a published one", {})
    print(f"tokenizer: {name}, {tok.vocab_size:,} pieces")
    for text, ids in golden.items():
        if (found := tok.encode(text)) != ids:
            raise ValueError(f"tokenizer of {name}: {text!r} -> {found}, expected {ids}")
    n_images = "<image_soft_token>" in tok  # a piece that text-only models have no row for
    if tok.vocab_size - n_images > cfg.vocab_size:
        raise ValueError(f"tokenizer: {tok.vocab_size} pieces, but the embedding has only "
                         f"{cfg.vocab_size} rows")


def self_check(weights: str) -> None:
    """Checks a Gemma folder; its last line begins with PASS, or with FAIL and why.

    A text is scored as a user's turn and as it is; the better score counts.

    Args:
        weights: Hugging Face folder: config.json, safetensors and tokenizer.
    """
    cfg, tok = gemma.read_config(weights), data.Tokenizer(weights)
    check_tokenizer(tok, cfg)
    dtype = jnp.float32 if cfg.n_params < 10**8 else jnp.bfloat16
    cfg, params = gemma.load(weights, dtype)
    print(f"{cfg.n_params:,} parameters, {cfg.num_hidden_layers} layers of {cfg.model_type}")
    turn = [{"role": "user", "content": PARAGRAPH}]
    rows = {"a user's turn": (tok.chat(turn, generate=False)[:-2], tok.chat(turn)),  # no turn's end
            "plain text": ([tok.bos, *tok.encode(PARAGRAPH)],) * 2}
    n, scores = len(tok.encode(PARAGRAPH)), {}
    for kind, (ids, _) in rows.items():
        logp_BTV = jax.nn.log_softmax(gemma.logits(params, cfg, jnp.asarray([ids]))[:, :-1])
        logp_BT1 = jnp.take_along_axis(logp_BTV, jnp.asarray([ids[1:]])[..., None], axis=-1)
        scores[kind] = float(jnp.exp(-logp_BT1[0, -n:].mean()))
    kind = min(scores, key=lambda kind: scores[kind])
    said = f"perplexity {scores[kind]:.2f} on {n} tokens of English as {kind}"
    if not scores[kind] < MAX_PERPLEXITY:  # NaN too
        raise ValueError(f"{said}, expected below {MAX_PERPLEXITY:g}")
    prompt, device = rows[kind][1], gemma.all_devices(jax.devices()[:1])
    engine = sampler.Sampler(cfg, device, slots=1, max_prompt=len(prompt), max_new=64, dtype=dtype)
    (answer,) = engine.sample(params, [prompt], temperature=0, stop=tok.stop_ids)
    print(f"{PARAGRAPH} -> {tok.decode(answer.ids)!r} (yours to judge)\nPASS: {said}")


def main() -> None:
    """The command line, here and of gemma.py."""
    try:
        tyro.cli(self_check)
    except ValueError as e:
        sys.exit(f"FAIL: {e}")


if __name__ == "__main__":
    main()
