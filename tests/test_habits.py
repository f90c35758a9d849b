"""What people write with transformers, written here: it works, or one line says what to write instead."""

import copy
import pickle
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import GenerationConfig, JaxgenError
from jaxgen.convert.options import as_quantization

IDS = np.array([[1, 5, 9]])


@pytest.fixture(scope="module")
def shared() -> Any:
    return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return jaxgen.AutoTokenizer.from_pretrained(jaxgen.demo.path(), padding_side="left")


@pytest.fixture
def model(shared: Any) -> Any:
    """The demo model, to be changed: a module of its own, with the same arrays."""
    return copy.copy(shared)


class TestGenerationConfig:
    def test_a_field_of_the_models_own_is_set(self, model: Any):
        model.generation_config.max_new_tokens = 4
        model.generation_config.pad_token_id = 7
        assert model.generate(IDS, eos_token_id=None).shape == (1, 7)
        assert model.generation_config.pad_token_id == model.generation_config.filler_id == 7

    def test_what_was_taken_before_says_what_holds_now(self, model: Any):
        config = model.generation_config
        model.generation_config.max_new_tokens = 4
        config.do_sample = True
        assert (config.max_new_tokens, model.generation_config.do_sample) == (4, True)

    def test_what_was_taken_before_another_was_assigned_can_be_assigned_again(self, model: Any):
        before = model.generation_config
        before.max_new_tokens = 3
        model.generation_config = GenerationConfig(max_new_tokens=4)
        assert (before.max_new_tokens, model.generation_config.max_new_tokens) == (3, 4)
        before.do_sample = True
        assert model.generation_config.do_sample is None
        model.generation_config = before
        assert (model.generation_config.max_new_tokens, model.generation_config.do_sample) == (3, True)

    def test_models_that_were_given_the_same_one_do_not_share_it(self, model: Any, shared: Any):
        config = GenerationConfig(max_new_tokens=4)
        model.generation_config = config
        clone, other = nnx.clone(model), copy.copy(shared)
        other.generation_config = model.generation_config
        model.generation_config.max_new_tokens = config.max_new_tokens = 5
        config.max_new_tokens = 6
        given = [each.generation_config.max_new_tokens for each in (model, clone, other)]
        assert given == [5, 4, 4]

    def test_a_copy_belongs_to_no_model(self, model: Any):
        changed = copy.deepcopy(model.generation_config)
        changed.max_new_tokens = 4
        assert model.generate(IDS, generation_config=changed).shape == (1, 7)
        assert model.generation_config.max_new_tokens is None
        assert type(changed) is GenerationConfig
        assert pickle.loads(pickle.dumps(model.generation_config)) == model.generation_config
        assert repr(model.generation_config) == repr(copy.copy(model.generation_config))

    @pytest.mark.slow
    def test_what_was_compiled_for_other_values_is_compiled_again(self, model: Any):
        generate: Any = nnx.jit(jaxgen.generate)
        widths = []
        for number in (2, 3, 2):
            model.generation_config.max_new_tokens = number
            widths.append(generate(model, IDS).shape[1])  # pyright: ignore[reportAttributeAccessIssue]
        assert widths == [5, 6, 5]

    def test_a_static_argument_of_jit_cannot_change_any_more(self):
        config = GenerationConfig(max_new_tokens=4)
        jax.jit(lambda x, config: x, static_argnames="config")(1, config=config)
        with pytest.raises(JaxgenError, match="max_new_tokens=5: this GenerationConfig was hashed"):
            config.max_new_tokens = 5
        changed = copy.copy(config)
        changed.max_new_tokens = 5
        assert changed != config

    @pytest.mark.parametrize(("name", "value"), [("max_new_token", 5), ("temperature", "hot"), ("dola_layers", "high")])
    def test_what_is_set_is_checked(self, model: Any, name: str, value: Any):
        with pytest.raises(JaxgenError, match=name):
            setattr(model.generation_config, name, value)

    def test_from_pretrained_and_to_dict(self):
        config = GenerationConfig.from_pretrained(jaxgen.demo.path(), max_new_tokens=4)
        assert GenerationConfig(**config.to_dict()) == config
        assert (config.max_new_tokens, config.eos_token_id) == (4, 2)


class TestConfig:
    def test_token_ids_and_use_cache_can_be_set_and_generation_asks_its_own_config(self, model: Any):
        model.config = copy.copy(model.config)
        before = model.generate(IDS, max_new_tokens=4)
        structure = hash(model.config)
        model.config.pad_token_id, model.config.eos_token_id = 7, [2, 3]
        model.config.use_cache, model.config.pretraining_tp = False, 1
        assert (model.config.pad_token_id, model.config.eos_token_id, model.config.use_cache) == (7, (2, 3), False)
        assert (model.generate(IDS, max_new_tokens=4) == before).all()
        assert hash(model.config) == structure
        assert model.config.to_dict()["pad_token_id"] == 7

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("hidden_size", 8, r"dataclasses.replace\(config, hidden_size=...\)"),
            ("pad_token_id", "x", "must be a token id"),
            ("use_cache", 1, "must be true or false"),
            ("attention_bias", True, "attention_bias=True is not supported"),
            ("temperature", 0.5, "no such field"),
        ],
    )
    def test_what_cannot_be_set(self, shared: Any, name: str, value: Any, says: str):
        with pytest.raises(JaxgenError, match=says):
            setattr(copy.copy(shared.config), name, value)

    def test_auto_config(self):
        config = jaxgen.AutoConfig.from_pretrained(jaxgen.demo.path(), num_hidden_layers=2)
        assert (config.model_type, config.num_hidden_layers, config.use_cache) == ("mistral", 2, True)
        assert jaxgen.MistralConfig.from_hf(config.to_dict()) == config
        with pytest.raises(JaxgenError, match="never runs code"):
            jaxgen.AutoConfig.from_pretrained(jaxgen.demo.path(), trust_remote_code=True)
        with pytest.raises(JaxgenError, match="no field 'layers'"):
            jaxgen.AutoConfig.from_pretrained(jaxgen.demo.path(), layers=2)


class TestTokenizer:
    def test_inputs_are_moved_to_the_device_as_torch_users_do(self, model: Any, tokenizer: Any):
        inputs = tokenizer(["1, 2, 3", "I am"], padding=True, return_tensors="jax").to(model.device)
        assert isinstance(inputs["input_ids"], jax.Array)
        ids = model.generate(**inputs, max_new_tokens=4)
        assert tokenizer.batch_decode(inputs.input_ids, skip_special_tokens=True) == ["1, 2, 3", "I am"]
        same = tokenizer(["1, 2, 3", "I am"], padding=True, return_tensors="np")
        assert (model.generate(**same, max_new_tokens=4) == ids).all()

    def test_a_chat(self, tokenizer: Any):
        chat = [{"role": "user", "content": "Hello"}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="jax", return_dict=True).to("cpu")
        assert isinstance(inputs["input_ids"], jax.Array)
        assert "Hello" in tokenizer.apply_chat_template(chat, tokenize=False)

    def test_it_is_copied_pickled_and_saved(self, tokenizer: Any, tmp_path: Any):
        again = pickle.loads(pickle.dumps(copy.deepcopy(tokenizer)))
        again.save_pretrained(tmp_path)
        saved = jaxgen.AutoTokenizer.from_pretrained(tmp_path)
        assert saved("1, 2").to("cpu") == again("1, 2") == tokenizer("1, 2")

    def test_torch_tensors_without_torch(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(JaxgenError, match="write return_tensors='np'"):
            tokenizer("1, 2", return_tensors="pt")

    def test_no_code_of_a_repository(self):
        with pytest.raises(JaxgenError, match="never runs code"):
            jaxgen.AutoTokenizer.from_pretrained(jaxgen.demo.path(), trust_remote_code=True)


@pytest.mark.parametrize("name", ["TextStreamer", "TextIteratorStreamer", "AsyncTextIteratorStreamer"])
def test_transformers_streamers_can_be_imported_from_here(name: str):
    import transformers

    assert getattr(jaxgen, name) is getattr(transformers, name)


class TestModel:
    def test_methods_that_change_nothing(self, model: Any):
        same = [model.eval(), model.train(), model.train(False), model.to(model.device), model.to("cpu"), model.cpu()]
        same += [model.to(device="cpu", dtype="float32"), model.to(np.float32), model.eval().to("cpu")]
        assert all(each is model for each in same)

    @pytest.mark.parametrize(
        ("place", "says"), [("bfloat16", "load it with dtype='bfloat16'"), ("cuda:7", "JAX"), ("here", "device_map")]
    )
    def test_it_is_not_moved(self, model: Any, place: str, says: str):
        with pytest.raises(JaxgenError, match=says):
            model.to(place)

    def test_what_it_says_of_itself(self, model: Any):
        assert model.can_generate()
        assert model.num_parameters() == 2_689_280
        assert model.num_parameters(exclude_embeddings=True) == 2_689_280 - 640 * 256
        assert model.get_memory_footprint() == 4 * 2_689_280
        assert model.hf_device_map == {"": model.device}
        assert model.get_input_embeddings() is model.model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head

    def test_of_four_bits(self):
        model = jaxgen.MistralForCausalLM.from_pretrained(jaxgen.demo.path(), load_in_4bit=True)
        assert model.num_parameters() == 2_689_280
        assert model.num_parameters(only_trainable=True) == 2 * 640 * 256 + 9 * 256
        assert model.get_memory_footprint() < 2 * 2_689_280


class TestArguments:
    def test_forms_of_the_prompt(self, model: Any, tokenizer: Any):
        inputs = tokenizer(["1, 2, 3", "I am"], padding=True, return_tensors="np")
        wanted = model.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4)
        given = inputs["input_ids"], inputs["attention_mask"]
        types = np.zeros_like(given[0])
        for ids in (
            model.generate(inputs, max_new_tokens=4),
            model.generate(inputs=given[0], attention_mask=given[1], max_new_tokens=4),
            model.generate(**inputs, token_type_ids=types, max_new_tokens=4),
            model.generate({**inputs, "token_type_ids": types}, GenerationConfig(max_new_tokens=4)),
        ):
            assert (ids == wanted).all()

    def test_a_chat(self, model: Any, tokenizer: Any):
        chat = [{"role": "user", "content": "Hello"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="np", return_dict=True)
        assert (model.generate(inputs, max_new_tokens=4) == model.generate(**inputs, max_new_tokens=4)).all()

    def test_transformers_own_config_in_second_place(self, model: Any):
        import transformers

        config = transformers.GenerationConfig(max_new_tokens=4)
        assert (model.generate(IDS, config) == model.generate(IDS, max_new_tokens=4)).all()

    @pytest.mark.parametrize(
        ("arguments", "options", "says"),
        [
            (("1, 2, 3",), {}, "jaxgen.pipeline"),
            ((["1, 2, 3"],), {}, "tokenizer"),
            ((IDS,), {"inputs": IDS}, "given twice"),
            (({"ids": IDS},), {}, "no input_ids"),
            (({"input_ids": IDS, "attention_mask": IDS},), {"attention_mask": IDS}, "attention_mask was given twice"),
            ((IDS, GenerationConfig()), {"generation_config": GenerationConfig()}, "given twice"),
            ((IDS,), {"logits_processor": [lambda input_ids, scores: scores]}, "takes two arguments"),
            ((IDS,), {"stopping_criteria": lambda input_ids, scores: False}, "takes two arguments"),
        ],
    )
    def test_what_to_write_instead(self, model: Any, arguments: Any, options: Any, says: str):
        with pytest.raises(JaxgenError, match=says):
            model.generate(*arguments, **options)

    @pytest.mark.slow
    def test_lists_of_functions(self, model: Any):
        def only_seven(tokens: Any, lengths: Any, logits: Any) -> Any:
            return jax.numpy.where(jax.numpy.arange(logits.shape[1]) == 7, logits, -jax.numpy.inf)

        processors = jaxgen.LogitsProcessorList([only_seven])
        assert model.generate(IDS, logits_processor=processors, max_new_tokens=2)[0, 3:].tolist() == [7, 7]
        criteria = jaxgen.StoppingCriteriaList()
        criteria.append(lambda tokens, lengths, scores: lengths > 4)
        assert model.generate(IDS, stopping_criteria=criteria, max_new_tokens=6).shape == (1, 5)

    def test_set_seed(self, model: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("jaxgen.generation.choosing.seed._of_script", [])

        def two() -> list[Any]:
            return [model.generate(IDS, do_sample=True, max_new_tokens=8).tolist() for _ in range(2)]

        jaxgen.set_seed(42)
        first = two()
        jaxgen.set_seed(42)
        assert two() == first
        assert first[0] != first[1]
        with pytest.raises(JaxgenError, match="set_seed"):
            jaxgen.set_seed("42")


class TestLoading:
    @pytest.mark.parametrize(
        "options",
        [
            {"attn_implementation": "sdpa", "low_cpu_mem_usage": True, "use_safetensors": True, "max_memory": None},
            {"trust_remote_code": False, "load_in_8bit": False, "variant": None, "device_map": {"": 0}},
        ],
    )
    def test_options_that_change_nothing(self, options: Any, shared: Any):
        model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), **options)
        assert (model.generate(IDS, max_new_tokens=2) == shared.generate(IDS, max_new_tokens=2)).all()

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"trust_remote_code": True}, "never runs code of a repository"),
            ({"max_memory": {0: "10GiB"}}, "the one device that device_map names"),
            ({"use_safetensors": False}, "safetensors and GGUF files only"),
            ({"device_map": {"": 99}}, "JAX has"),
            ({"device_map": {"model": 0, "lm_head": 1}}, "one device"),
            ({"quantization_config": {"load_in_8bit": True}}, "load_in_8bit=True"),
            ({"quantization_config": {"load_in_4bit": 1}}, "load_in_4bit=1 must be"),
            ({"quantization_config": {"bits": 4}}, "no field 'bits'"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
            (
                {"quantization_config": jaxgen.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["o"])},
                "skip",
            ),
            ({"quantization_config": 4}, "must be a jaxgen.Int4Config"),
        ],
    )
    def test_options_that_are_refused(self, options: Any, says: str):
        with pytest.raises(JaxgenError, match=says):
            jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), **options)

    @pytest.mark.slow
    def test_four_bits(self):
        def made(quantization_config: Any) -> Any:
            return jaxgen.AutoModelForCausalLM.from_pretrained(
                jaxgen.demo.path(), quantization_config=quantization_config
            )

        wanted = jax.tree.leaves(nnx.state(made(jaxgen.Int4Config())))
        ours = jaxgen.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        for config in ({"load_in_4bit": True}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, ours):
            for found, leaf in zip(jax.tree.leaves(nnx.state(made(config))), wanted, strict=True):
                assert (found == leaf).all()

    @pytest.mark.parametrize("given", [dict, jaxgen.BitsAndBytesConfig])
    def test_what_four_bits_of_bitsandbytes_change_nothing_is_said_once(
        self, given: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("jaxgen.generation.options.unused._said", set())
        set_here = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        config = as_quantization(False, given(load_in_4bit=True, **set_here))
        again = as_quantization(False, given(load_in_4bit=True, **set_here))
        assert config == again == jaxgen.Int4Config()
        [said] = caplog.messages
        assert all(f"{name}={value!r}" in said for name, value in set_here.items())
        assert "changes nothing" in said and "Int4Config" in said and "dtype" in said

    @pytest.mark.parametrize(
        "fields",
        [
            {"load_in_4bit": True},
            # what transformers writes down for it
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"},
            {"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"},
        ],
    )
    def test_nothing_is_said_of_what_nobody_set(self, fields: Any, caplog: pytest.LogCaptureFixture):
        as_quantization(False, fields)
        assert caplog.messages == []

    def test_from_config(self, monkeypatch: pytest.MonkeyPatch):
        import transformers

        monkeypatch.setattr("jaxgen.generation.choosing.seed._of_script", [])
        config = transformers.AutoConfig.from_pretrained(jaxgen.demo.path(), num_hidden_layers=1)
        heads = []
        for seed in (1, 1, 2):
            jaxgen.set_seed(seed)
            heads.append(jaxgen.AutoModelForCausalLM.from_config(config, dtype="bfloat16").lm_head.weight[...])
        assert heads[0].dtype == "bfloat16"
        assert (heads[0] == heads[1]).all() and not (heads[0] == heads[2]).all()
        with pytest.raises(JaxgenError, match="no option 'device'"):
            jaxgen.AutoModelForCausalLM.from_config(config, device="cpu")


class TestCall:
    def test_logits_and_no_loss(self, model: Any, tokenizer: Any):
        inputs = tokenizer(["1, 2, 3"], return_tensors="np")
        types = np.zeros_like(inputs["input_ids"])
        out = model(**inputs, token_type_ids=types, use_cache=False, return_dict=True, position_ids=None)
        assert isinstance(out, jaxgen.CausalLMOutput)
        assert (out.logits == model(inputs["input_ids"]).logits).all()
        assert out.loss is None and out["logits"] is out[0] is out[-1] is out.logits
        assert (len(out), list(out.keys()), out.to_tuple()) == (1, ["logits"], (out.logits,))
        assert "logits" in out and "loss" not in out

    @pytest.mark.slow
    def test_labels(self, model: Any):
        ids = np.array([[1, 5, 9, 4], [1, 7, 7, 8]], np.int32)
        labels = np.where(ids == 7, -100, ids)
        out = model(ids, labels=labels)
        logprobs = jax.nn.log_softmax(out.logits)
        wanted = [logprobs[0, 0, 5], logprobs[0, 1, 9], logprobs[0, 2, 4], logprobs[1, 2, 8]]
        np.testing.assert_allclose(out.loss, -np.mean(wanted), rtol=1e-5)
        assert out[0] is out["loss"] is out.loss and out[1] is out.logits
        assert list({**out}) == ["loss", "logits"]

    def test_it_goes_through_jaxs_transformations(self):
        config = jaxgen.MistralConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        structure, weights = nnx.split(jaxgen.MistralForCausalLM(config, rngs=nnx.Rngs(0)))
        ids = np.array([[1, 5, 8]], np.int32)

        def loss(weights: Any, ids: Any) -> Any:
            out = nnx.merge(structure, weights)(ids, labels=ids)
            return out.loss, out

        # vmap's output, jit's output, and what is beside a gradient, in one program
        @jax.jit
        def all_of_them(weights: Any, ids: Any) -> Any:
            return jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(weights, ids)

        gradient, out = all_of_them(weights, ids[None])
        assert isinstance(out, jaxgen.CausalLMOutput)
        assert out.logits.shape == (1, 1, 3, 9) and out.loss is not None and out.loss.shape == (1,)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert isinstance(nnx.jit(lambda model: model(ids))(nnx.merge(structure, weights)), jaxgen.CausalLMOutput)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"return_dict": False}, r"to_tuple\(\)"),
            ({"use_cache": True}, "model.prefill"),
            ({"output_hidden_states": True}, r"generate\(\.\.\., output_hidden_states=True"),
            ({"position_ids": IDS}, "there is no option 'position_ids'"),
            ({"labels": np.array([[1]])}, "expected that of input_ids"),
        ],
    )
    def test_what_to_write_instead(self, model: Any, options: Any, says: str):
        with pytest.raises(JaxgenError, match=says):
            model(IDS, **options)


OUT: Any = jaxgen.CausalLMOutput(jax.numpy.ones((2, 3, 4)))


class TestWhatIsNoArray:
    @pytest.mark.parametrize(
        "use",
        [
            lambda: OUT.shape,
            lambda: OUT.argmax(-1),
            lambda: OUT.at[0],
            lambda: OUT[:, -1],
            lambda: OUT[:1],
            lambda: OUT[..., 0],
            lambda: OUT[None],
            lambda: list(OUT),
            lambda: OUT + 1,
            lambda: 1 - OUT,
            lambda: OUT.logits * OUT,
            lambda: np.ones(4) * OUT,
            lambda: OUT @ np.ones(4),
            lambda: -OUT,
            lambda: OUT == OUT,
            lambda: bool(OUT),
            lambda: jax.numpy.sum(OUT),
            lambda: jax.numpy.argmax(OUT, -1),
            lambda: jax.numpy.asarray(OUT),
            lambda: jax.nn.log_softmax(OUT),
            lambda: np.asarray(OUT),
            lambda: np.exp(OUT),
            lambda: np.testing.assert_allclose(OUT, 1),
        ],
    )
    def test_it_says_where_the_array_is(self, use: Any):
        with pytest.raises(JaxgenError, match=r"write model\(\.\.\.\)\.logits"):
            use()

    @pytest.mark.parametrize(
        ("use", "says"),
        [
            (lambda: OUT.past_key_values, "return_dict_in_generate"),
            (lambda: OUT.logit, "it has .logits"),
            (lambda: OUT["loss"], "no 'loss'; it has logits"),
            (lambda: OUT[1], "no 1; it has logits"),
        ],
    )
    def test_what_it_has_not(self, use: Any, says: str):
        with pytest.raises(JaxgenError, match=says):
            use()

    def test_what_libraries_ask_any_object(self):
        assert not hasattr(OUT, "shape") and not hasattr(OUT, "__array_interface__")
        assert hash(OUT) and "logits" in repr(OUT)
        for other in (copy.copy(OUT), copy.deepcopy(OUT), pickle.loads(pickle.dumps(OUT))):
            assert (other.logits == OUT.logits).all()
        assert jax.block_until_ready(OUT).loss is None
