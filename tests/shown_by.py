"""The test that shows each option of `generate` at work; docs/support.md has them beside the options."""

from jaxgen.generation.options.refused import REFUSED
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS

PROCESSORS = "tests/oracle/test_processors_oracle.py"
BEAMS = "tests/oracle/test_beam_oracle.py"
SPECULATION = "tests/oracle/test_speculate_oracle.py"
OUTPUTS = "tests/oracle/test_outputs_oracle.py"
STOP_STRINGS = "tests/oracle/test_stop_strings_oracle.py"
SHOWN_BY: dict[str, str] = {
    **{name: PROCESSORS for name, option in (OPTIONS | ARGUMENTS).items() if option.processor},
    **{name: "tests/test_bad_input.py" for name in REFUSED},
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "tests/test_processors.py"),
    "max_length": "tests/test_stop.py",
    "max_new_tokens": "tests/test_generate.py",
    "max_time": "tests/test_stop.py",
    "stop_strings": STOP_STRINGS,
    "do_sample": "tests/test_sampling.py",
    "num_beams": BEAMS,
    "length_penalty": BEAMS,
    "early_stopping": BEAMS,
    "num_return_sequences": "tests/test_generate.py",
    "watermarking_config": "tests/test_processors.py",
    "guidance_scale": OUTPUTS,
    "eos_token_id": "tests/test_generate.py",
    "pad_token_id": "tests/test_generate.py",
    "bos_token_id": "tests/test_config.py",
    "return_dict_in_generate": "tests/test_generate.py",
    "output_scores": OUTPUTS,
    "output_logits": OUTPUTS,
    "output_attentions": OUTPUTS,
    "output_hidden_states": OUTPUTS,
    "top_logprobs": "tests/test_stop.py",
    "cache_implementation": "tests/test_reuse.py",
    "max_cache_len": "tests/test_reuse.py",
    "prefill_chunk_size": "tests/test_reuse.py",
    "num_assistant_tokens": SPECULATION,
    "assistant_confidence_threshold": "tests/test_speculate.py",
    "prompt_lookup_num_tokens": SPECULATION,
    "max_matching_ngram_size": SPECULATION,
    # Arguments that are not fields of a GenerationConfig.
    "constraint": "tests/test_constraints.py",
    "logits_processor": "tests/test_processors.py",
    "stopping_criteria": "tests/test_stop.py",
    "negative_prompt_ids": OUTPUTS,
    "negative_prompt_attention_mask": OUTPUTS,
    "assistant_model": SPECULATION,
    "streamer": "tests/oracle/test_stream_oracle.py",
    "strict": "tests/test_strict.py",
    "tokenizer": STOP_STRINGS,
    "past_key_values": "tests/test_reuse.py",
}
