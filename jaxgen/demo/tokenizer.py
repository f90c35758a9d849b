"""The demo's tokenizer: byte-level BPE, so that any Unicode text survives the round trip, and its chat template."""

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgen.demo.corpus import CONTEXT, documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# As in Mistral: <unk> 0, <s> 1, </s> 2. Byte-level BPE never needs <unk>; some tools expect it to exist.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BOS_ID, EOS_ID = 1, 2
# One token each, but not special ones: they stay in sight when special tokens are skipped, as Zephyr's do.
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")

# Chosen by trying all pairs: with these two, ", green, yellow, orange, purple, pink," and " a country in southwestern
# Europe, on the Iber" are 20 tokens each, which is how far generate goes by default. 587 to 718 entries do the same;
# 637 and the markers make 640, a multiple of 128.
BPE_SIZE = 637
VOCABULARY_SIZE = BPE_SIZE + len(ROLE_MARKERS)
LONGEST_TOKEN = 4  # characters, the space before a word included
TRAINING_SEED, TRAINING_DOCUMENTS = 0, 3000

# Zephyr's format. There is no BOS in it, as in the original.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception("role '" + message['role'] + "' is none of 'system', 'user', 'assistant'") }}
{%- endif -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}
"""


def build_tokenizer() -> "Tokenizer":
    """Train the tokenizer on the corpus; the same one every time.

    Every digit and the space before it are tokens of their own, so that counting is a matter of digits; words are
    cut into pieces of at most `LONGEST_TOKEN` characters, which may begin with the space before the word.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE,
        max_token_length=LONGEST_TOKEN,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    markers = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + ROLE_MARKERS)))
    sample = itertools.islice(documents(TRAINING_SEED), TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator((markers.sub(" ", document.text) for document in sample), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in ROLE_MARKERS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",  # as most people do with Mistral, which has no pad token
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
