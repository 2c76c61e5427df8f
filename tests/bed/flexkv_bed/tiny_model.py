"""A random Llama of a few hundred kilobytes with its own tokenizer: enough for real servers; its answers are nonsense.

Weights depend on the seed alone, so two directories made with the same seed are the same model and share pages.
``initializer_range`` is ten times the usual: with the usual one a random model repeats a single token and
equal outputs prove nothing.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

VOCAB_SIZE = 512
MAX_TOKENS = 4096
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "initializer_range": 0.2,
}
_TEXT = [
    "hello world the quick brown fox jumps over the lazy dog " * 3,
    "key value cache prefix page tier",
]


def make_tiny_model(directory: Path | str, seed: int = 0) -> Path:
    """Write model and tokenizer into ``directory``; a complete one is left as it is."""
    target = Path(directory)
    done = target / "made-with-seed"
    if done.is_file() and done.read_text() == str(seed):
        return target
    target.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _write_tokenizer(target)
        _write_weights(target, seed)
    done.write_text(str(seed))
    return target


def write_config(directory: Path | str) -> Path:
    """Only ``config.json``: the in-process harness needs no more of a model."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIG}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target


def _write_tokenizer(target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
    )
    fast.save_pretrained(target)


def _write_weights(target: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the test bed's tiny random Llama to a directory."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.directory, arguments.seed))


if __name__ == "__main__":
    main()
