"""A published Gemma against transformers and PEFT: run by `GEMMA_WEIGHTS=FOLDER pytest -m real`.

FOLDER holds config.json, safetensors and the tokenizer of one model, gemma-3-270m for speed. The
tolerances are float32's, for logits with a standard deviation of about 10.
"""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import gemma
import lora
import merge
import packed
import stage
import train_sft
from sampler import Sampler

FOLDER = Path(os.environ.get("GEMMA_WEIGHTS", "no weights"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (FOLDER / "config.json").exists(),
                       reason="GEMMA_WEIGHTS names no model folder"),
]
QUESTION = ("Natalia sold clips to 48 of her friends in April, and then she sold half as many "
            "clips in May. How many clips did Natalia sell altogether in April and May? ")


@pytest.fixture(scope="module")
def ours():
    return gemma.load(FOLDER)


@pytest.fixture(scope="module")
def tok():
    return data.Tokenizer(FOLDER)


def theirs(hf, dtype="float32", folder=FOLDER):
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype,
                                                   attn_implementation="eager").eval()


def long_prompt(cfg, tok) -> list[int]:
    """Numbered sentences, 40 tokens past the window of the local layers."""
    text = "".join(f"{i}. {QUESTION}" for i in range(99))
    return [tok.bos, *tok.encode(text)][: cfg.sliding_window + 40]


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def test_logits_are_those_of_transformers_past_the_window(hf, ours, tok):
    """In float32 to rounding, which this text, repeating itself, amplifies; bfloat16 as theirs."""
    cfg, params = ours
    ids = long_prompt(cfg, tok)
    exact = their_logits(theirs(hf, "float64"), ids)
    error = lambda logits: np.abs(logits - exact)
    got = np.asarray(gemma.logits(params, cfg, np.array([ids]))[0])
    assert error(got).mean() < 1e-4 and error(got).max() < 0.02
    assert (got.argmax(-1) == exact.argmax(-1)).all()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = np.asarray(gemma.logits(half, cfg, np.array([ids]))[0])
    assert error(got).mean() < 1.2 * error(their_logits(theirs(hf, "bfloat16"), ids)).mean()


def test_greedy_decoding_is_that_of_transformers_past_the_window(hf, ours, tok):
    import torch

    cfg, params = ours
    prompts = [long_prompt(cfg, tok), [tok.bos, *tok.encode(QUESTION + "Answer:")]]
    n_new = 48
    model = theirs(hf)
    sampler = Sampler(cfg, gemma.all_devices(jax.devices()[:1]), slots=2, cached_prompts=2,
                      max_prompt=len(prompts[0]), max_new=n_new, dtype=jnp.float32)
    rollouts = sampler.sample(params, prompts, temperature=0, stop=())
    got = {r.prompt: r.ids.tolist() for r in rollouts}
    for i, prompt in enumerate(prompts):
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n_new,
                             min_new_tokens=n_new, eos_token_id=None)
        assert got[i] == out[0, len(prompt):].tolist(), f"prompt {i}"


def batches(tok, n, rows=2, length=128):
    """Rows of one example each: the packed layout, which transformers can read row by row."""
    for i in range(n):
        chats = [[{"role": "user", "content": f"What is {i} + {b}?"},
                  {"role": "assistant", "content": data.format_completion(
                      f"{i} + {b} = {i + b}.", str(i + b))}] for b in range(rows)]
        examples = [packed.Example(*tok.example(chat)) for chat in chats]
        yield packed.assemble([[example] for example in examples], rows, length)


def test_ten_lora_steps_lose_what_peft_and_transformers_lose(hf, ours, tok, tmp_path):
    """The same adapter, batches, AdamW and clipping: ten losses to 1e-4, in float32."""
    import torch

    peft = pytest.importorskip("peft")
    cfg, params = ours
    config = train_sft.resolve(train_sft.Config(model="gemma3-270m", lora_rank=8, steps=10,
                                                learning_rate=1e-4, dtype="float32"))
    adapter = stage.new_adapter(cfg, config)
    lora.save(tmp_path, adapter, cfg)
    model = peft.PeftModel.from_pretrained(theirs(hf), tmp_path, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, config.learning_rate, betas=(0.9, config.adam_b2),
                              weight_decay=config.weight_decay)
    their_losses = []
    for batch in batches(tok, config.steps):
        tokens, mask = (torch.tensor(batch[k]).long() for k in ("tokens", "mask"))
        labels = torch.where(mask > 0, tokens, -100)
        their_loss = model(tokens, attention_mask=torch.tensor(batch["segments"]),
                           labels=labels, use_cache=False).loss
        their_loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        adamw.step()
        adamw.zero_grad()
        their_losses.append(their_loss.item())

    mesh = gemma.all_devices(jax.devices()[:1])
    step, _ = train_sft.make_steps(cfg, config, mesh, sharded=False)
    weights, scale = lora.split(adapter)
    fixed = {"base": params} | scale
    opt, losses = stage.optimizer(config).init(weights), []
    for batch in batches(tok, config.steps):
        micro = {k: v[None] for k, v in batch.items()}
        weights, opt, metrics = step(weights, opt, fixed, micro,
                                     np.float32(config.learning_rate), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, their_losses, rtol=0, atol=1e-4)
    assert losses[-1] < 0.7 * losses[0]


def test_a_merged_folder_reopened_is_base_and_adapter(hf, ours, tok, tmp_path):
    cfg, params = ours
    adapter = lora.init(cfg, jax.random.key(1), 8, 8.0)
    leaves, shape = jax.tree.flatten(adapter["b"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    adapter = adapter | {"b": jax.tree.unflatten(shape, drawn)}
    lora.save(tmp_path / "adapter", adapter, cfg)
    merge.main(adapter=str(tmp_path / "adapter"), out=str(tmp_path / "merged"),
              model="gemma3-270m", weights=str(FOLDER), dtype="float32")
    ids = tok.chat([{"role": "user", "content": QUESTION}])
    expected = np.asarray(gemma.logits(params, cfg, np.array([ids]), lora=adapter)[0])
    assert np.abs(expected - np.asarray(gemma.logits(params, cfg, np.array([ids]))[0])).max() > 1
    merged = theirs(hf, folder=tmp_path / "merged")
    np.testing.assert_allclose(their_logits(merged, ids), expected, rtol=0, atol=2e-3)
    reopened, weights = gemma.load(tmp_path / "merged")
    assert dataclasses.replace(reopened, eos_token_id=cfg.eos_token_id) == cfg
    np.testing.assert_allclose(gemma.logits(weights, cfg, np.array([ids]))[0], expected, atol=2e-3)
