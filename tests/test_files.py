"""Model folders: what we write, what we read, what we refuse, and the self-check."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from make_tokenizer import train_tokenizer
from safetensors.numpy import load_file, save_file

import data
import gemma

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("gemma2", "gemma3")
DTYPES = ("float32", "bfloat16")
TINY = {
    "gemma2": gemma.Config(
        "gemma2", 512, 64, 96, 3, 4, 2, 16, 20, 8, (False, True, False), 1e4, 1e4,
        attn_logit_softcapping=2.0, final_logit_softcapping=4.0,
    ),
    "gemma3": gemma.Config(
        "gemma3_text", 512, 64, 96, 4, 4, 2, 16, 20, 8, (False, False, True, False), 1e4, 1e6,
        rope_factor=8.0,
    ),
}
TEXT = "Tom has 12 apples.\n\nHe   buys <b>7</b> more, for 3½ euros: how many now?"
USER = {"role": "user", "content": " What is 2 + 2?\n"}
CHAT = [USER, {"role": "assistant", "content": "It is 4."}, {"role": "user", "content": "Sure?"}]
logits = jax.jit(gemma.logits, static_argnames="cfg")


def random_params(cfg, dtype="float32", seed=0):
    """No two leaves alike, norms included: a mix-up of two tensors changes the logits."""
    rng = np.random.default_rng(seed)
    leaf = lambda spec, w: rng.normal(0, float(w.std()) or 0.4, w.shape)
    params = jax.tree.map(leaf, gemma.specs(cfg), gemma.init(cfg, jax.random.key(seed)))
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params)


def assert_identical(found, expected):
    """The same trees, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        bits = f"u{a.dtype.itemsize}"
        assert np.array_equal(a.view(bits), b.view(bits)), jax.tree_util.keystr(path)


def one_line(call, *arguments, **options) -> str:
    """The message of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Compiling is most of this file's time, and nothing here runs long enough to repay it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    texts = [3 * gemma.PARAGRAPH, *((ROOT / f).read_text() for f in ("data.py", "gemma.py"))]
    where = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    return {
        family: data.Tokenizer(train_tokenizer(where[family], texts, 512, family))
        for family in FAMILIES
    }


@pytest.fixture
def folder(tmp_path):
    """A good folder for a test to spoil."""
    gemma.save(tmp_path / "model", TINY["gemma3"], random_params(TINY["gemma3"]))
    return tmp_path / "model"


# ------------------------------------------------------------------- what transformers makes of it


@pytest.fixture(scope="session")
def hf():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def their_logits(hf, path, tokens, dtype="float32"):
    """Of the stored weights, computed in float32; `dtype` is what config.json says they are in."""
    import torch

    model = hf.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert str(model.dtype) == f"torch.{dtype}"
    return model.float().eval()(torch.asarray(np.asarray(tokens))).logits.numpy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_what_we_save(hf, tokenizers, tmp_path, family, dtype, tied):
    tok = tokenizers[family]
    stops = tok.eos, tok.end_of_turn
    cfg = dataclasses.replace(TINY[family], tie_word_embeddings=tied, eos_token_id=stops)
    params = random_params(cfg, dtype)
    gemma.save(tmp_path, cfg, params)
    tok.save(tmp_path)

    auto = hf.AutoTokenizer.from_pretrained(tmp_path)
    ids = auto(TEXT)["input_ids"]
    assert ids == [tok.bos, *tok.encode(TEXT)] and len(ids) > 3 * cfg.sliding_window
    chat = auto.apply_chat_template(CHAT, add_generation_prompt=True)
    assert chat["input_ids"] == tok.chat(CHAT)
    generation = hf.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == list(stops)

    theirs = their_logits(hf, tmp_path, [ids], dtype)
    read_cfg, read = gemma.load(tmp_path)
    assert read_cfg == cfg
    assert np.std(theirs) > 0.3
    np.testing.assert_allclose(logits(read, cfg, jnp.asarray([ids])), theirs, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------ load, save, load


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_load_save_load_is_bit_identical(tmp_path, family, dtype):
    cfg = dataclasses.replace(TINY[family], tie_word_embeddings=dtype == "float32")
    params = random_params(cfg, dtype)
    odd = jnp.asarray([-0.0, jnp.nan, -jnp.inf, 1e-40], dtype)  # bits that arithmetic would lose
    for w in (params, params["layers"]):
        w |= {k: v.at[(0,) * (v.ndim - 1)].set(jnp.resize(odd, v.shape[-1:]))
              for k, v in w.items() if k != "layers"}
    gemma.save(tmp_path / "a", cfg, params)
    cfg_a, params_a = gemma.load(tmp_path / "a", dtype)
    gemma.save(tmp_path / "b", cfg_a, params_a)
    cfg_b, params_b = gemma.load(tmp_path / "b", dtype)
    assert cfg == cfg_a == cfg_b
    assert_identical(params_a, params)
    assert_identical(params_b, params)
    for a in (tmp_path / "a").iterdir():
        assert a.read_bytes() == (tmp_path / "b" / a.name).read_bytes()


def test_saving_over_a_model_leaves_nothing_of_it(tmp_path):
    """Nor of one in several files, which other programs would read instead."""
    cfg, kept = TINY["gemma3"], ("model.safetensors.bak", "tokenizer.model", "model.py")
    for name in (*kept, "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text(name)
    for seed in range(2):
        params = random_params(cfg, seed=seed)
        gemma.save(tmp_path, cfg, params)
        assert_identical(gemma.load(tmp_path)[1], params)
        assert {f.name for f in tmp_path.iterdir()} == {
            *kept, "model.safetensors", "config.json", "generation_config.json"}
    assert all((tmp_path / name).read_text() == name for name in kept)


def test_a_single_file_comes_before_an_index_as_in_transformers(hf, folder, tmp_path):
    cfg, params = gemma.load(folder)
    write_as(tmp_path / "other", cfg, random_params(cfg, seed=1), n_files=3)
    for file in (*(tmp_path / "other").glob("part*"), *(tmp_path / "other").glob("*.index.json")):
        shutil.copy(file, folder)
    tokens = np.random.default_rng(0).integers(1, cfg.vocab_size, (2, 24))
    theirs = their_logits(hf, folder, tokens)
    assert_identical(gemma.load(folder)[1], params)
    np.testing.assert_allclose(logits(params, cfg, tokens), theirs, rtol=0, atol=2e-5)


def test_stop_ids_of_generation_config_survive(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    for stored, expected in (([1, 107], (1, 107)), (106, (1, 106)), (None, (1,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        cfg, params = gemma.load(folder)
        assert cfg.eos_token_id == expected
        gemma.save(tmp_path / "copy", cfg, params)
        for file in ("config.json", "generation_config.json"):
            written = json.loads((tmp_path / "copy" / file).read_text())
            assert written["eos_token_id"] == list(expected)


# ---------------------------------------------------------------------------- files of other makers

PREFIXES = {  # text, head, vision
    "text-only": ("model.", "lm_head.", ()),
    "hub": (
        "language_model.model.", "language_model.lm_head.",
        ("vision_tower.vision_model.embeddings.patch_embedding.bias",
         "multi_modal_projector.mm_input_projection_weight"),
    ),
    "transformers 5": (
        "language_model.model.", "lm_head.",
        ("vision_tower.embeddings.patch_embedding.bias",
         "multi_modal_projector.mm_soft_emb_norm.weight"),
    ),
    "in memory": (
        "model.language_model.", "lm_head.",
        ("model.vision_tower.vision_model.embeddings.patch_embedding.bias",
         "model.multi_modal_projector.mm_soft_emb_norm.weight"),
    ),
}


def write_as(path, cfg, params, prefixes="text-only", stored="float32", n_files=1, tie=None):
    """The files another program would write; returns the tensors under their text-only names."""
    text, head, vision = PREFIXES[prefixes]
    gemma.save(path, cfg, params)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: w.astype(stored) for name, w in tensors.items()}
    out = {
        head + "weight" if name.startswith("lm_head") else text + name.removeprefix("model."): w
        for name, w in tensors.items()
    }
    out |= {name: np.zeros((3, 2, 5), np.int64) for name in vision}  # never looked at
    (path / "model.safetensors").unlink()
    weight_map = {name: f"part {i % n_files}.safetensors" for i, name in enumerate(sorted(out))}
    for file in set(weight_map.values()):
        save_file({n: out[n] for n in out if weight_map[n] == file}, path / file)
    if n_files > 1:
        save_file({"unused": np.zeros(3)}, path / "not in the index.safetensors")
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (path / "model.safetensors.index.json").write_text(index)
    config = json.loads((path / "config.json").read_text())
    config |= {} if tie is None else {"tie_word_embeddings": tie}
    if vision:
        config = {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": config,
            "vision_config": {"model_type": "siglip_vision_model"},
        }
        config |= {} if tie is None else {"tie_word_embeddings": tie}
    (path / "config.json").write_text(json.dumps(config))


def rounded(params, *dtypes):
    for dtype in dtypes:
        params = jax.tree.map(lambda w, to=dtype: w.astype(to), params)
    return params


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("prefixes", PREFIXES)
def test_every_prefix_and_dtype_loads(tmp_path, prefixes, stored):
    cfg = TINY["gemma3"]
    params = random_params(cfg)
    for n_files in (1, 3):
        path = tmp_path / str(n_files)
        write_as(path, cfg, params, prefixes, stored, n_files)
        for dtype in DTYPES:
            found_cfg, found = gemma.load(path, dtype)
            assert found_cfg == cfg
            assert_identical(found, rounded(params, stored, dtype))


@pytest.mark.parametrize("config_says_tied", [True, False])
@pytest.mark.parametrize("prefixes", PREFIXES)
def test_a_head_is_separate_if_it_differs_from_the_embedding(tmp_path, prefixes, config_says_tied):
    tied, separate = (dataclasses.replace(TINY["gemma3"], tie_word_embeddings=t) for t in (1, 0))
    params = random_params(separate)
    write_as(tmp_path / "differs", separate, params, prefixes, tie=config_says_tied)
    cfg, found = gemma.load(tmp_path / "differs")
    assert cfg == separate
    assert_identical(found, params)

    params["lm_head"] = params["embed_tokens"]
    write_as(tmp_path / "equal", separate, params, prefixes, "float16", tie=config_says_tied)
    cfg, found = gemma.load(tmp_path / "equal")
    assert cfg == tied and "lm_head" not in found
    del params["lm_head"]
    assert_identical(found, rounded(params, "float16", "float32"))


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_onto_eight_devices(tmp_path, dtype, shard):
    cfg = dataclasses.replace(TINY["gemma2"], tie_word_embeddings=False)
    params = random_params(cfg)
    gemma.save(tmp_path, cfg, params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found_cfg, found = gemma.load(tmp_path, dtype, mesh, shard)
    assert found_cfg == cfg
    assert_identical(found, rounded(params, dtype))
    n_split = 0
    for leaf, spec in zip(
        jax.tree.leaves(found), jax.tree.leaves(gemma.pspecs(cfg, shard)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
        split = leaf.size // leaf.addressable_shards[0].data.size
        assert len(leaf.addressable_shards) == 8 and split == (8 if "data" in spec else 1)
        n_split += split == 8
    assert n_split == (9 if shard else 0)  # seven linears, the embedding and the head


# ------------------------------------------------------------------------------------ bad files


def test_part_of_a_file_and_garbage_are_refused_in_one_line(folder):
    file = folder / "model.safetensors"
    good = file.read_bytes()
    header = int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    lengths = [0, 1, 7, 8, 9, 7 + header, 8 + header, len(good) - 1]
    lengths += [rng.randrange(len(good)) for _ in range(12)]
    lie = lambda n: n.to_bytes(8, "little") + good[8:]
    bad = {f"{n} of {len(good)} bytes": good[:n] for n in lengths}
    bad |= {f"header length {n}": lie(n) for n in (0, 1, header - 1, len(good), 2**40, 2**64 - 1)}
    bad |= {"random bytes": rng.randbytes(4000), "zeros": bytes(4000), "longer": good + b"\0"}
    bad |= {"a pointer to the file": b"version https://git-lfs.github.com/spec/v1\nsize 9\n"}
    for what, content in bad.items():
        file.write_bytes(content)
        message = one_line(gemma.load, folder)
        assert message.startswith(f"{file}: not a safetensors file, or a part of one"), what
    for _ in range(40):  # a wrong byte in the header: refused, or harmless, but nothing else
        i = 8 + rng.randrange(header)
        file.write_bytes(good[:i] + rng.randbytes(1) + good[i + 1 :])
        try:
            gemma.load(folder)
        except ValueError as e:
            assert str(folder) in str(e) and "\n" not in str(e)


NORM = "model.norm.weight"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
WRONG_TENSORS = {  # the change, what the message must say beside the folder
    "missing": (lambda t: t.pop(Q_PROJ), ["expected 54", "found 53", f"missing: ['{Q_PROJ}']"]),
    "many missing": (
        lambda t: [t.pop(n) for n in list(t) if ".2." in n],
        ["expected 54", "found 41", "missing: ['model.layers.2."],
    ),
    "extra": (
        lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[NORM]}),
        ["expected 54", "found 55", "unexpected: ['model.layers.4.mlp.up_proj.weight']"],
    ),
    "renamed": (
        lambda t: t.update({"two\nlines": t.pop(NORM)}),
        [f"missing: ['{NORM}']", r"unexpected: ['two\nlines']"],
    ),
    "head alone": (
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        ["missing: ['model.embed_tokens.weight']"],
    ),
    "transposed": (
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].T.copy()}),
        ["model.safetensors", "model.embed_tokens.weight", "[64, 512]", "expected [512, 64]"],
    ),
    "misshapen": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :63].copy()}),
        ["model.safetensors", Q_PROJ, "[64, 63]", "expected [64, 64]"],
    ),
    "scalar": (lambda t: t.update({NORM: np.zeros((), np.float32)}), [NORM, "[]", "expected [64]"]),
    "misshapen head": (
        lambda t: t.update({"lm_head.weight": np.zeros((512, 63), np.float32)}),
        ["lm_head.weight", "[512, 63]", "expected [512, 64]"],
    ),
    "integers": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int32)}),
        ["model.safetensors", Q_PROJ, "I32", "expected BF16, F16 or F32"],
    ),
    "bytes": (lambda t: t.update({NORM: t[NORM].astype(np.uint8)}), [NORM, "U8", "expected BF16"]),
    "doubles": (
        lambda t: t.update({NORM: t[NORM].astype(np.float64)}),
        [NORM, "F64", "expected BF16"],
    ),
    "quantised by bitsandbytes": (
        lambda t: t.update({Q_PROJ: np.zeros((2048, 1), np.uint8), Q_PROJ + ".absmax": t[NORM]}),
        [f"holds quantised weights (as {Q_PROJ}.absmax)", "bfloat16, float16 or float32"],
    ),
    "quantised by GPTQ": (
        lambda t: t.update({Q_PROJ.replace("weight", "qweight"): np.zeros((8, 8), np.int32)}),
        ["holds quantised weights", "qweight"],
    ),
    "none": (lambda t: t.clear(), ["expected 54", "found 0"]),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_wrong_tensors_are_named_with_expected_and_found(folder, what):
    change, said = WRONG_TENSORS[what]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    message = one_line(gemma.load, folder)
    assert message.startswith(str(folder))
    for words in said:
        assert words in message, message


def test_an_untied_config_needs_its_head(folder):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert "missing: ['lm_head.weight']" in one_line(gemma.load, folder)


@pytest.mark.parametrize(
    "index, said",
    [
        ('{"weight_map": {"a": "b', "cannot be read as JSON"),
        ("[]", "expected a JSON object, found a list"),
        ('{"metadata": {}}', "expected 54 text tensors"),
        ('{"weight_map": ["a"]}', "weight_map is list, expected dict"),
        ('{"weight_map": {"a": 1}}', "'1', expected a file in"),
        ('{"weight_map": {"a": null, "b": "part.safetensors"}}', "'None', expected a file in"),
        ('{"weight_map": {}}', "expected 54 text tensors"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors'"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "'../outside.safetensors'"),
        ('{"weight_map": {"a": "../model/part.safetensors"}}', "'../model/part.safetensors'"),
        ('{"weight_map": {"a": "ABSOLUTE/outside.safetensors"}}', "outside.safetensors'"),
        ('{"weight_map": {"a": ".."}}', "'..'"),
        ('{"weight_map": {"a": ""}}', "''"),
        ('{"weight_map": {"a": "two\\nlines"}}', r"'two\nlines'"),
    ],
)
def test_bad_index_files(folder, index, said):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    shutil.copy(folder / "part.safetensors", folder.parent / "outside.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(index.replace("ABSOLUTE", str(folder.parent)))
    message = one_line(gemma.load, folder)
    assert message.startswith(str(folder)) and said in message, message


@pytest.mark.parametrize(
    "config, said",
    [
        (None, "no such file"),
        ("", "cannot be read as JSON"),
        ("{'model_type': 'gemma2'}", "cannot be read as JSON"),
        ("\0", "cannot be read as JSON"),
        ('{"a":' * 100_000, "cannot be read as JSON (maximum recursion depth"),
        ('{"model_type": "gemma2", "head_dim": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ("[]", "expected a JSON object, found a list"),
        ('"gemma2"', "expected a JSON object, found a str"),
        ("{}", "model_type None, expected gemma2, gemma3 or gemma3_text"),
        *((json.dumps({"model_type": kind}), f"model_type {kind!r}, expected gemma2")
          for kind in ("llama", "gemma", "gemma3n", ["gemma2"])),
        *((json.dumps({"model_type": kind} | wrong), said) for kind, wrong, said in (
            ("gemma3", {"hidden_activation": "silu"}, "hidden_activation 'silu', expected"),
            ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'yarn', expected"),
            ("gemma2", {"rope_parameters": {"factor": 8.0}}, "RoPE scaling is supported on"),
            ("gemma3", {"attention_bias": True}, "attention_bias and bidirectional attention"),
            ("gemma3", {"use_bidirectional_attention": True}, "bidirectional attention are not"),
            ("gemma3", {"layer_types": ["sliding_attention"]}, "do not describe 26 layers"),
            ("gemma3", {"num_key_value_heads": 3}, "a multiple of cfg.num_key_value_heads=3"),
            ("gemma3", {"text_config": 3}, "text_config is 3, expected dict"),
            ("gemma2", {"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected int"),
            ("gemma2", {"num_hidden_layers": 10**9}, "is 1000000000, expected int from 1 to 1024"),
            ("gemma2", {"hidden_size": 64.0}, "hidden_size is 64.0, expected int"),
            ("gemma2", {"hidden_size": 10**12}, "hidden_size is 1000000000000, expected int from"),
            ("gemma2", {"num_key_value_heads": 0}, "num_key_value_heads is 0, expected int from 1"),
            ("gemma2", {"sliding_window": True}, "sliding_window is True, expected int"),
            ("gemma2", {"head_dim": 255}, "even cfg.head_dim=255"),
            ("gemma2", {"rope_theta": float("nan")}, "rope_theta is nan, expected float"),
            ("gemma2", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected float"),
            ("gemma2", {"final_logit_softcapping": "30"}, "is '30', expected float"),
            ("gemma2", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected bool"),
            ("gemma2", {"layer_types": [[]] * 26}, "layer_types [[], []"),
            ("gemma2", {"layer_types": {"a": 1}}, "layer_types is dict, expected list"),
            ("gemma2", {"rope_parameters": {"factor": []}}, "factor is list, expected float"),
            ("gemma3", {"rope_parameters": {"full_attention": 1}}, "full_attention is 1, expected"),
            ("gemma3", {"rope_scaling": 8}, "rope_scaling is 8, expected dict"),
            ("gemma3", {"eos_token_id": [1, "two\nlines"]}, r"eos_token_id is 'two\nlines'"),
            ("gemma3", {"eos_token_id": -1}, "eos_token_id is -1, expected int from 0"),
        )),
    ],
)
def test_bad_configs(folder, config, said):
    file = folder / "config.json"
    file.unlink() if config is None else file.write_text(config)
    message = one_line(gemma.load, folder)
    assert message.startswith(f"{file}: ") and said in message, message


def test_other_bad_folders(folder, tmp_path):
    assert "nowhere" in one_line(gemma.load, tmp_path / "nowhere")
    for content in ("[1]", '{"eos_token_id": 1.5}', "{"):
        (folder / "generation_config.json").write_text(content)
        assert str(folder / "generation_config.json") in one_line(gemma.load, folder)
    (folder / "generation_config.json").unlink()
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert "found a.safetensors, b.safetensors" in one_line(gemma.load, folder)
    (folder / "a.safetensors").unlink()
    gemma.load(folder)  # one file of any name
    (folder / "b.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")  # a cache that was cleaned
    assert "model.safetensors: not a safetensors file" in one_line(gemma.load, folder)
    assert str(folder / "tokenizer.model") in one_line(data.Tokenizer, folder)


@pytest.mark.parametrize("file, found", [
    ("pytorch_model.bin", "PyTorch weights"), ("model.ckpt", "PyTorch weights"),
    ("gemma-3-1b-it-q4_0.gguf", "GGUF weights"), ("gemma3-1b-it/_METADATA", "Flax weights"),
    ("manifest.ocdbt", "Flax weights"), ("model.weights.h5", "Keras weights"),
])
def test_other_formats_are_named(folder, file, found):
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"")
    message = one_line(gemma.load, folder)
    assert f"found {found} ({folder / file}); take the Transformers version" in message
    (folder / "config.json").unlink()
    assert f"the folder holds {found}" in one_line(gemma.load, folder)


def test_an_adapter_is_not_a_model(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "the folder holds a PEFT adapter without its base" in one_line(gemma.load, folder)


def test_a_vision_tower_shows_in_the_config(folder, tmp_path):
    assert not gemma.is_multimodal(folder)
    write_as(tmp_path / "4b", TINY["gemma3"], random_params(TINY["gemma3"]), "hub")
    assert gemma.is_multimodal(tmp_path / "4b")


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickled_weights_are_never_opened(folder, tmp_path):
    marker = tmp_path / "marker"
    payload = pickle.dumps(Hostile(marker))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    assert "found PyTorch weights" in one_line(gemma.load, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "pytorch_model.bin"}}')
    assert "pytorch_model.bin: not a safetensors file" in one_line(gemma.load, folder)
    index.unlink()
    (folder / "model.safetensors").write_bytes(payload)
    assert "model.safetensors: not a safetensors file" in one_line(gemma.load, folder)
    assert not marker.exists()
    pickle.loads(payload).close()
    assert marker.exists()  # so it would have been seen


def test_an_unwritable_place_is_named(tmp_path):
    cfg, params = TINY["gemma3"], random_params(TINY["gemma3"])
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        message = one_line(gemma.save, place, cfg, params)
        assert message.startswith(f"{place}: cannot write")
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    assert str(tmp_path / "taken") in one_line(gemma.save, tmp_path / "taken", cfg, params)
    if os.geteuid():  # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        for place in (tmp_path / "locked", tmp_path / "locked" / "below"):
            assert str(place) in one_line(gemma.save, place, cfg, params)


# ------------------------------------------------------------------------------------- self-check


def save_both(path, cfg, params, tok):
    gemma.save(path, cfg, params)
    tok.save(path)
    return str(path)


def rows_of(tok):
    """gemma.PARAGRAPH as a user's turn and as plain text: ids that end with the paragraph."""
    turn = tok.chat([{"role": "user", "content": gemma.PARAGRAPH}], generate=False)
    return {"a user's turn": turn[:-2], "plain text": [tok.bos, *tok.encode(gemma.PARAGRAPH)]}


def mean_loss(params, cfg, ids, n):
    """Of the last n tokens."""
    logits_BTV = gemma.logits(params, cfg, jnp.asarray([ids]))[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.asarray([ids[1:]]))
    return losses[0, -n:].mean()


def overfitted(cfg, ids, steps=20):
    """A model that knows one text by heart."""
    opt = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        grads = jax.grad(mean_loss)(params, cfg, ids, len(ids) - 1)
        updates, state = opt.update(grads, state)
        return optax.apply_updates(params, updates), state

    params = gemma.init(cfg, jax.random.key(0))
    state = opt.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("kind", ["a user's turn", "plain text"])
def test_chat_models_and_base_models_that_read_english_pass(tokenizers, tmp_path, capsys, kind):
    cfg, tok = TINY["gemma3"], tokenizers["gemma3"]
    gemma.self_check(save_both(tmp_path, cfg, overfitted(cfg, rows_of(tok)[kind]), tok))
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"PASS: perplexity ([\d.]+) on (\d+) tokens of English as (.*)", last)
    assert 1 <= float(found[1]) < 20 and found[3] == kind
    assert int(found[2]) == len(tok.encode(gemma.PARAGRAPH))


def test_a_published_vocabulary_is_known_by_its_pieces(tokenizers, folder, monkeypatch, capsys):
    """By its size and the id of <start_of_turn>, not by the bytes of the file."""
    tok = tokenizers["gemma3"]
    tok.save(folder)
    golden = {text: tok.encode(text) for text in ("a  b", TEXT)}
    monkeypatch.setattr(gemma, "VOCABULARIES", {tok.start_of_turn: ("Ours", golden)})

    class AsLarge(data.Tokenizer):
        def __init__(self, path):
            super().__init__(path)
            self.vocab_size = 262_144

    monkeypatch.setattr(data, "Tokenizer", AsLarge)
    assert "262144 pieces, but the embedding has only 512" in one_line(gemma.self_check, folder)
    assert "tokenizer: Ours, 262,144 pieces" in capsys.readouterr().out
    golden["a  b"] = golden["a  b"][1:]
    assert f"expected {golden['a  b']}" in one_line(gemma.self_check, folder)


def test_the_golden_ids_are_those_of_the_published_vocabulary(golden):
    stored = golden.parent / "real" / "golden_tokens.json"
    if not stored.exists():
        pytest.skip("no published ids")
    ids = {t["text"]: t["ids"] for t in json.loads(stored.read_text())["texts"]}
    _, texts = gemma.VOCABULARIES[105]
    assert texts and all(ids[text] == expected for text, expected in texts.items())


def test_the_shipped_model_passes_and_opens_in_transformers(capsys):
    gemma.self_check(str(ROOT / "tiny"))
    out = capsys.readouterr().out
    assert f"\n{gemma.CONFIGS['tiny'].n_params:,} parameters" in out and "<answer>" in out
    assert sum(f.stat().st_size for f in (ROOT / "tiny").iterdir()) < 2.5e6
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    their_tok = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny")
    cfg, params = gemma.load(ROOT / "tiny")
    tok, chat = data.Tokenizer(ROOT / "tiny"), [USER]
    rendered = their_tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert rendered == tok.chat(chat)
    ids = np.array([rendered])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(gemma.logits(params, cfg, ids), expected, atol=5e-5)


def test_an_untrained_model_fails_by_its_perplexity(tokenizers, tmp_path):
    cfg, tok = TINY["gemma3"], tokenizers["gemma3"]
    params = random_params(cfg)
    path = save_both(tmp_path, cfg, params, tok)
    command = [sys.executable, str(ROOT / "gemma.py"), "--weights", path]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=quick)
    assert done.returncode == 1 and "PASS" not in done.stdout
    found = re.fullmatch(r"FAIL: perplexity ([\d.]+) on .*, expected below 50\n", done.stderr)[1]
    n = len(tok.encode(gemma.PARAGRAPH))
    for ids in (rows := rows_of(tok).values()):
        assert tok.decode(ids[-n:]) == gemma.PARAGRAPH
    expected = min(float(jnp.exp(mean_loss(params, cfg, ids, n))) for ids in rows)
    assert abs(float(found) - expected) < 0.02 and expected > 100


def test_a_nan_and_folders_that_cannot_be_checked_fail(tokenizers, folder, tmp_path):
    cfg, tok = TINY["gemma3"], tokenizers["gemma3"]
    params = random_params(cfg)
    params["layers"]["q_norm"] = params["layers"]["q_norm"].at[1, 3].set(jnp.nan)
    path = save_both(tmp_path / "nan", cfg, params, tok)
    assert one_line(gemma.self_check, path).startswith("perplexity nan on ")
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size - 1)
    path = save_both(tmp_path / "short", cfg, random_params(cfg), tok)
    assert one_line(gemma.self_check, path).endswith("the embedding has only 511 rows")
    for path, missing in ((tmp_path / "nowhere", "config.json"), (folder, "tokenizer.model")):
        assert one_line(gemma.self_check, path).startswith(f"{path / missing}: ")
