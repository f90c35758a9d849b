"""What tests of the engine share: small models, prompts, and what `generate` gives for them alone."""

import tempfile

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxgen

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "max_position_embeddings": 128}
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "int4": {"load_in_4bit": True},
    "window": {"sliding_window": 12},
}


def tiny(dtype=jnp.float32, load_in_4bit=False, **fields):
    config = jaxgen.MistralConfig(**{"sliding_window": None, **SIZES, **HEADS, **fields})
    model = jaxgen.MistralForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))
    if not load_in_4bit:
        return model
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        options = {"dtype": "float32", "quantization_config": jaxgen.Int4Config(group_size=32)}
        model = jaxgen.AutoModelForCausalLM.from_pretrained(directory, **options)
    model.name_or_path = None
    return model


def alone(model, engine, prompt, **options):
    """What `generate` gives in the engine's shape: ids, both log-probabilities, the reason to end."""
    options |= {"tokenizer": engine.tokenizer} if "constraint" in options else {}
    out = model.generate([prompt], strict=engine.strict, return_dict_in_generate=True, **options)
    count = int(out.lengths[0])
    new = out.sequences[0, len(prompt) : len(prompt) + count].tolist()
    return new, out.logprobs[0, :count].tobytes(), out.model_logprobs[0, :count].tobytes(), out.finish_reason[0]


def found(handle):
    done = handle.result(timeout=300)
    tokens = done.tokens
    return done.token_ids, tokens.logprobs.tobytes(), tokens.model_logprobs.tobytes(), done.finish_reason


def prompt_of(length, shared):
    common, own = np.random.default_rng(0), np.random.default_rng([length, shared])
    return [*common.integers(3, 97, 40)[: min(shared, length)].tolist(), *own.integers(3, 97, 40).tolist()][:length]
