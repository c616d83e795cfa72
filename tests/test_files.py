"""Model folders: what we write, what we read, what we refuse, and the self-check."""

import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, one_line
from jax.sharding import NamedSharding
from make_tokenizer import train_tokenizer
from safetensors.numpy import load_file, save_file

import check
import data
import gemma
import model_files

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


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    texts = [3 * check.PARAGRAPH, *((ROOT / f).read_text() for f in ("data.py", "gemma.py"))]
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


def their_logits(hf, path, tokens, dtype="float32"):
    """Of the stored weights, computed in float32; `dtype` is what config.json says they are in."""
    import torch

    model = hf.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert str(model.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        return model.float().eval()(torch.asarray(np.asarray(tokens))).logits.numpy()


@pytest.mark.parametrize("family, dtype, tied", [
    ("gemma2", "bfloat16", True), ("gemma3", "float32", False)])
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


@pytest.mark.parametrize("family, dtype", [("gemma2", "float32"), ("gemma3", "bfloat16")])
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
    "hub": ("language_model.model.", "language_model.lm_head.",
            ("vision_tower.vision_model.bias", "multi_modal_projector.mm_input_projection_weight")),
    "transformers 5": ("language_model.model.", "lm_head.", ("vision_tower.embeddings.bias",)),
    "in memory": ("model.language_model.", "lm_head.",
                  ("model.vision_tower.bias", "model.multi_modal_projector.mm_norm.weight")),
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
    for i in range(n_files):
        part = {name: out[name] for name in sorted(out)[i::n_files]}
        name = f"model-{i + 1:05}-of-{n_files:05}" if n_files > 1 else "weights"
        save_file(part, path / f"{name}.safetensors")
    if n_files > 1:
        save_file({"unused": np.zeros(3)}, path / "consolidated.safetensors")
        names = {name: f"model-{i % n_files + 1:05}-of-{n_files:05}.safetensors"
                 for i, name in enumerate(sorted(out))}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = json.loads((path / "config.json").read_text())
    tie = {} if tie is None else {"tie_word_embeddings": tie}
    config |= tie
    if vision:
        config = {"model_type": "gemma3", "text_config": config, "vision_config": {}} | tie
    (path / "config.json").write_text(json.dumps(config))


def rounded(params, *dtypes):
    for dtype in dtypes:
        params = jax.tree.map(lambda w, to=dtype: w.astype(to), params)
    return params


@pytest.mark.parametrize("prefixes, stored, n_files", [
    ("text-only", "float16", 3), ("hub", "bfloat16", 3), ("transformers 5", "float32", 1),
    ("in memory", "float32", 3)])
def test_every_prefix_and_dtype_loads(tmp_path, prefixes, stored, n_files):
    cfg = TINY["gemma3"]
    params = random_params(cfg)
    write_as(tmp_path, cfg, params, prefixes, stored, n_files)
    assert model_files.is_multimodal(tmp_path) == (prefixes != "text-only")
    for dtype in DTYPES:
        found_cfg, found = gemma.load(tmp_path, dtype)
        assert found_cfg == cfg
        assert_identical(found, rounded(params, stored, dtype))


@pytest.mark.parametrize("prefixes, config_says_tied", [
    ("text-only", True), ("text-only", False), ("hub", True), ("in memory", True)])
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


@pytest.mark.parametrize("shard, dtype", [(False, "float32"), (True, "bfloat16")])
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
    bad = [good[:n] for n in (0, 7, 8, 7 + header, 8 + header, len(good) - 1)]
    bad += [n.to_bytes(8, "little") + good[8:] for n in (0, header - 1, len(good), 2**64 - 1)]
    bad += [rng.randbytes(4000), good + b"\0", b"version https://git-lfs.github.com/spec/v1\n"]
    for content in bad:
        file.write_bytes(content)
        message = one_line(gemma.load, folder)
        assert message.startswith(f"{file}: not a safetensors file, or a part of one")
    for _ in range(20):  # a wrong byte in the header: refused, or harmless, but nothing else
        i = 8 + rng.randrange(header)
        file.write_bytes(good[:i] + rng.randbytes(1) + good[i + 1 :])
        try:
            gemma.load(folder)
        except ValueError as e:
            assert str(folder) in str(e) and "\n" not in str(e)


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
WRONG_TENSORS = {  # the change, what the message must say beside the folder
    "missing": (lambda t: t.pop(Q_PROJ), f"found 53 .*missing 1: ['{Q_PROJ}'], unexpected 0"),
    "extra": (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[NORM]}),
              "unexpected 1: ['model.layers.4.mlp.up_proj.weight']"),
    "renamed": (lambda t: t.update({"two\nlines": t.pop(NORM)}),
                f"missing 1: ['{NORM}'], unexpected 1: ['two\\nlines']"),
    "transposed": (lambda t: t.update({EMBED: t[EMBED].T.copy()}),
                   f"{EMBED} is F32 [64, 512], expected BF16, F16 or F32 [512, 64]"),
    "scalar": (lambda t: t.update({NORM: np.zeros((), np.float32)}), f"{NORM} is F32 [], expected"),
    "misshapen head": (lambda t: t.update({"lm_head.weight": np.zeros((512, 63), np.float32)}),
                       "lm_head.weight is F32 [512, 63], expected BF16, F16 or F32 [512, 64]"),
    "integers": (lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int32)}), f"{Q_PROJ} is I32 ["),
    "quantised": (lambda t: t.update({Q_PROJ: np.zeros((2048, 1), np.uint8)}),
                  f"{Q_PROJ} is U8 [2048, 1], .*; quantised weights cannot be read"),
    "none": (lambda t: t.clear(), "found 0 tensors"),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_wrong_tensors_are_named_with_expected_and_found(folder, what):
    change, said = WRONG_TENSORS[what]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    message = one_line(gemma.load, folder)
    assert message.startswith(str(folder)) and all(part in message for part in said.split(".*"))


@pytest.mark.parametrize("named", [
    "null", '".."', '"gone.safetensors"', '"../outside.safetensors"',
    '"ABSOLUTE/outside.safetensors"'])
def test_an_index_leads_nowhere_else(folder, named):
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = '{"weight_map": {"model.norm.weight": ' + named + "}}"
    file = folder / "model.safetensors.index.json"
    file.write_text(index.replace("ABSOLUTE", str(folder.parent)))
    message = one_line(gemma.load, folder)
    assert message.startswith(f"{folder}/") and "which is not in its folder" in message


BAD_CONFIGS = [  # changes of a config.json, what is said of each
    ("gemma3", {"hidden_activation": "silu"}, "hidden_activation is 'silu', expected one of"),
    ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type is 'yarn', exp"),
    ("gemma2", {"rope_parameters": {"factor": 8.0}}, "RoPE factor of local layers is 8.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3", {"layer_types": ["sliding_attention"]}, "layer_types is ['sliding_attention'], exp"),
    ("gemma2", {"layer_types": [[]] * 26}, "layer_types is [[], []"),
    ("gemma3", {"text_config": 3}, "text_config is 3, expected dict"),
    ("gemma2", {"hidden_size": 64.0}, "hidden_size is 64.0, expected int from"),
    ("gemma2", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected int"),
    ("gemma2", {"num_key_value_heads": 0}, "num_key_value_heads is 0, expected int from"),
    ("gemma2", {"rope_theta": float("nan")}, "rope_theta is nan, expected float"),
    ("gemma2", {"final_logit_softcapping": "30"}, "is '30', expected float"),
    ("gemma2", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected bool"),
    ("gemma3", {"eos_token_id": [1, "two\nlines"]}, r"eos_token_id is 'two\nlines'"),
    ("gemma3", {"eos_token_id": -1}, "eos_token_id is -1, expected int from 0"),
]


@pytest.mark.parametrize("config, said", [
    ("", "cannot be read as JSON"),
    ('{"a":' * 100_000, "cannot be read as JSON (maximum recursion depth"),
    ("[]", "expected a JSON object, found a list"),
    ("{}", "model_type is None, expected one of gemma2, gemma3, gemma3_text"),
    ('{"model_type": ["gemma2"]}', "model_type is ['gemma2'], expected one of"),
    *((json.dumps({"model_type": kind} | wrong), said) for kind, wrong, said in BAD_CONFIGS),
])
def test_bad_configs(folder, config, said):
    (folder / "config.json").write_text(config)
    message = one_line(gemma.load, folder)
    assert message.startswith(f"{folder / 'config.json'}: ") and said in message, message


def test_other_bad_folders(folder, tmp_path):
    """What was expected, and what the folder holds instead."""
    assert "nowhere/config.json: no such file" in one_line(gemma.load, tmp_path / "nowhere")
    for content in ("[1]", '{"eos_token_id": 1.5}', "{"):
        (folder / "generation_config.json").write_text(content)
        assert str(folder / "generation_config.json") in one_line(gemma.load, folder)
    (folder / "generation_config.json").unlink()
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    gemma.load(folder)  # model.safetensors alone, as in transformers
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert "index.json, found a.safetensors, b.safetensors, conf" in one_line(gemma.load, folder)
    (folder / "a.safetensors").unlink()
    gemma.load(folder)  # one file of any name
    (folder / "b.safetensors").rename(folder / "gemma-3-1b-it-q4_0.gguf")
    assert "found config.json, gemma-3-1b-it-q4_0.gguf" in one_line(gemma.load, folder)
    (folder / "config.json").unlink()
    assert "found gemma-3-1b-it-q4_0.gguf" in one_line(gemma.load, folder)
    assert str(folder / "tokenizer.model") in one_line(data.Tokenizer, folder)


def test_weights_that_run_code_are_never_opened(folder):
    """torch.save writes a program that is run to load it: here one that leaves a file."""
    torch = pytest.importorskip("torch")

    class Hostile:
        def __reduce__(self):
            return Path.touch, (folder / "opened",)

    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for name in ("pytorch_model.bin", "model.safetensors"):
        torch.save(Hostile(), folder / name)
        assert name in one_line(gemma.load, folder)
    assert not (folder / "opened").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (folder / "opened").exists()  # so it would have been seen


# ------------------------------------------------------------------------------------- self-check


def perplexities(params, cfg, tok):
    """Of check.PARAGRAPH as a user's turn and as plain text, and its number of tokens."""
    turn = tok.chat([{"role": "user", "content": check.PARAGRAPH}], generate=False)
    rows = {"a user's turn": turn[:-2], "plain text": [tok.bos, *tok.encode(check.PARAGRAPH)]}
    n, found = len(tok.encode(check.PARAGRAPH)), {}
    for kind, ids in rows.items():
        assert tok.decode(ids[-n:]) == check.PARAGRAPH
        logp_TV = jax.nn.log_softmax(logits(params, cfg, jnp.asarray([ids]))[0, :-1])
        logp_T = jnp.take_along_axis(logp_TV, jnp.array(ids[1:])[:, None], axis=1)[:, 0]
        found[kind] = float(jnp.exp(-logp_T[-n:].mean()))
    return found, n


def test_the_better_perplexity_decides(tokenizers, folder, monkeypatch, capsys):
    tok, (cfg, params) = tokenizers["gemma3"], gemma.load(folder)
    tok.save(folder)
    expected, n = perplexities(params, cfg, tok)
    kind = min(expected, key=expected.get)
    said = rf"perplexity ([\d.]+) on {n} tokens of English as {kind}"
    command = [sys.executable, str(ROOT / "gemma.py"), "--weights", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "PASS" not in done.stdout
    found = re.fullmatch(f"FAIL: {said}, expected below 50\n", done.stderr)[1]
    assert abs(float(found) - expected[kind]) < 0.02 and expected[kind] > 100
    monkeypatch.setattr(check, "MAX_PERPLEXITY", expected[kind] + 1)
    check.self_check(str(folder))
    assert re.fullmatch(f"PASS: {said}", capsys.readouterr().out.splitlines()[-1])


def test_a_nan_and_a_short_embedding_fail(tokenizers, tmp_path):
    cfg, tok = TINY["gemma3"], tokenizers["gemma3"]
    params = random_params(cfg)
    params["layers"]["q_norm"] = params["layers"]["q_norm"].at[1, 3].set(jnp.nan)
    gemma.save(tmp_path, cfg, params)
    tok.save(tmp_path)
    assert one_line(check.self_check, str(tmp_path)).startswith("perplexity nan on ")
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size - 1)
    assert one_line(check.check_tokenizer, tok, cfg).endswith("the embedding has only 511 rows")


def test_a_published_vocabulary_is_known_by_its_size_and_pieces(monkeypatch, capsys):
    tok, cfg = data.Tokenizer(ROOT / "tiny"), TINY["gemma3"]
    golden = {text: tok.encode(text) for text in ("a  b", TEXT)}
    monkeypatch.setattr(check, "VOCABULARIES", {tok.start_of_turn: ("Ours", golden)})
    tok.vocab_size = 262_144
    message = one_line(check.check_tokenizer, tok, cfg)
    assert "262144 pieces, but the embedding has only 512 rows" in message
    assert "tokenizer: Ours, 262,144 pieces" in capsys.readouterr().out
    golden["a  b"] = golden["a  b"][1:]
    assert f"expected {golden['a  b']}" in one_line(check.check_tokenizer, tok, cfg)


def test_the_shipped_model_passes_and_opens_in_transformers(capsys):
    check.self_check(str(ROOT / "tiny"))
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
