"""What of transformers' `generate` is supported, as a table: `python -m jaxgen.generation.support`."""

import sys

from jaxgen.generation.fields import CHECKS, METADATA, REFUSED

# The test that shows each option at work. Where transformers gains a field that is neither here nor refused,
# tests/test_support.py fails.
_PROCESSORS = "tests/oracle/test_processors_oracle.py"
_OPTIONS = "tests/oracle/test_options_oracle.py"
_BEAMS = "tests/oracle/test_beam_oracle.py"
_SPECULATION = "tests/oracle/test_speculate_oracle.py"
_OUTPUTS = "tests/oracle/test_outputs_oracle.py"
SHOWN_BY: dict[str, str] = {
    "max_length": "tests/test_stop.py",
    "max_new_tokens": "tests/test_generate.py",
    "min_length": _PROCESSORS,
    "min_new_tokens": _PROCESSORS,
    "max_time": "tests/test_stop.py",
    "stop_strings": "tests/oracle/test_stop_strings_oracle.py",
    "do_sample": "tests/test_sampling.py",
    "num_beams": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "num_return_sequences": "tests/test_generate.py",
    "sequence_bias": _PROCESSORS,
    "repetition_penalty": _PROCESSORS,
    "encoder_repetition_penalty": _PROCESSORS,
    "no_repeat_ngram_size": _PROCESSORS,
    "encoder_no_repeat_ngram_size": _PROCESSORS,
    "bad_words_ids": _PROCESSORS,
    "forced_bos_token_id": _PROCESSORS,
    "forced_eos_token_id": _PROCESSORS,
    "remove_invalid_values": _PROCESSORS,
    "exponential_decay_length_penalty": _PROCESSORS,
    "suppress_tokens": _PROCESSORS,
    "begin_suppress_tokens": _PROCESSORS,
    "temperature": _PROCESSORS,
    "top_h": _PROCESSORS,
    "top_k": _PROCESSORS,
    "top_p": _PROCESSORS,
    "min_p": _PROCESSORS,
    "typical_p": _PROCESSORS,
    "epsilon_cutoff": _PROCESSORS,
    "eta_cutoff": _PROCESSORS,
    "watermarking_config": "tests/test_processors.py",
    "renormalize_logits": _PROCESSORS,
    "guidance_scale": _OUTPUTS,
    "eos_token_id": "tests/test_generate.py",
    "pad_token_id": "tests/test_generate.py",
    "bos_token_id": "tests/test_config.py",
    "return_dict_in_generate": "tests/test_generate.py",
    "output_scores": _OUTPUTS,
    "output_logits": _OUTPUTS,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "top_logprobs": "tests/test_stop.py",
    "cache_implementation": "tests/test_reuse.py",
    "max_cache_len": "tests/test_reuse.py",
    "prefill_chunk_size": "tests/test_reuse.py",
    "num_assistant_tokens": _SPECULATION,
    "assistant_confidence_threshold": "tests/test_speculate.py",
    "prompt_lookup_num_tokens": _SPECULATION,
    "max_matching_ngram_size": _SPECULATION,
}
# Arguments of generate() that are not fields of a GenerationConfig.
ARGUMENTS: dict[str, str] = {
    "logits_processor": "tests/test_processors.py",
    "stopping_criteria": "tests/test_stop.py",
    "prefix_allowed_tokens_fn": _PROCESSORS,
    "negative_prompt_ids": _OUTPUTS,
    "negative_prompt_attention_mask": _OUTPUTS,
    "assistant_model": _SPECULATION,
    "streamer": "tests/oracle/test_stream_oracle.py",
    "strict": "tests/test_strict.py",
    "tokenizer": "tests/oracle/test_stop_strings_oracle.py",
    "past_key_values": "tests/test_reuse.py",
}
_REMARKS = {
    "cache_implementation": "static (always) or quantized (int8)",
    "max_length": "counts a row's own tokens, not its padding",
    "min_length": "counts a row's own tokens, not its padding",
    "num_return_sequences": "one prefill for all",
    "past_key_values": "also by the name it has since transformers 5.24, `cache`",
    "top_logprobs": "jaxgen's own",
    "watermarking_config": "Kirchenbauer; hashed with JAX's threefry, so a detector must be jaxgen's",
    "logits_processor": "jittable functions of tokens, lengths and logits",
    "stopping_criteria": "jittable functions of tokens, lengths and scores",
}


def table() -> str:
    """One line per option, in Markdown: supported or refused, and the test that shows it or the reason."""
    lines = ["| option | | |", "|---|---|---|"]
    for name, test in sorted((SHOWN_BY | ARGUMENTS).items()):
        remark = f"; {_REMARKS[name]}" if name in _REMARKS else ""
        lines.append(f"| `{name}` | supported{remark} | `{test}` |")
    for name, (_, reason) in sorted(REFUSED.items()):
        lines.append(f"| `{name}` | refused: {reason} | `tests/test_bad_input.py` |")
    return "\n".join(lines)


def unknown(names: set[str]) -> set[str]:
    """Those of transformers' fields that the table does not know."""
    return names - CHECKS.keys() - REFUSED.keys() - METADATA


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
