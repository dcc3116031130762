"""The tokenizer: byte-level BPE of 4096 tokens in which every digit stands alone and indentation is cheap."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 4096
# Line ends with the indentation that follows, words with one leading space, runs of the rest. Digits are split before.
PIECES = r"\n+ *| ?[A-Za-z]+| ?[^\sA-Za-z\d]+| +(?= [^ ])| +|\s"


def train(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges of these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            max_token_length=24,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def load(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer saved by `train`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
