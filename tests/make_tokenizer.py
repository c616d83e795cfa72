"""Trains a small tokenizer with the special pieces and the options of Gemma's own.

    python tests/make_tokenizer.py DIRECTORY TEXT_FILE... --vocab-size 512

Two things are smaller than Gemma's: the vocabulary (256 pieces are bytes and about 30 special,
which leaves some 225 of 512 for characters and merges) and the set of runs of spaces, which are
2, 4, 8 and 16 long instead of every length to 31. SentencePiece takes the longest run that matches
while transformers merges pairs: with powers of two they agree at every length, with Gemma's runs
only up to the longest.
"""

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

TAGS = ("<b>", "</b>", "<i>", "</i>", "<code>", "</code>")


def special_pieces(family: str) -> list[str]:
    """USER_DEFINED pieces in Gemma's order: `<mask>` is 4, the families' turn ids one apart."""
    first = {"gemma2": ("<mask>", "<2mass>", "[@BOS@]"), "gemma3": ("<mask>", "[multimodal]")}
    return [
        *first[family],
        *(f"<unused{n}>" for n in range(4)),
        *("<start_of_turn>", "<end_of_turn>"),
        *("\n" * n for n in (1, 2, 3, 4)),
        *("▁" * n for n in (2, 4, 8, 16)),
        *TAGS,
        *(("<start_of_image>", "<end_of_image>") if family == "gemma3" else ()),
    ]


def train_tokenizer(
    directory: str | Path,
    texts: Iterable[str],
    vocab_size: int,
    family: str = "gemma3",
    extra: Iterable[str] = (),
) -> Path:
    """Writes `directory/tokenizer.model`, the same bytes for the same texts, and returns its path.

    `extra` adds USER_DEFINED pieces such as `<answer>`; the real tokenizers have none of them.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        user_defined_symbols=[*special_pieces(family), *extra],
        **{f"{name}_id": n for n, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        # A character too rare to be a piece becomes its UTF-8 bytes: still one token in ASCII.
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,  # longer lines are left out without a word
        num_threads=1,
        minloglevel=2,
    )
    path = Path(directory) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where tokenizer.model goes")
    parser.add_argument("texts", type=Path, nargs="+", help="text files to learn the pieces from")
    parser.add_argument("--vocab-size", type=int, default=512, help="number of pieces in all")
    parser.add_argument("--family", choices=["gemma2", "gemma3"], default="gemma3")
    parser.add_argument("--extra", nargs="*", default=[], help="more pieces that are never split")
    args = parser.parse_args()
    texts = (path.read_text(encoding="utf-8") for path in args.texts)
    print(train_tokenizer(args.directory, texts, args.vocab_size, args.family, args.extra))
