"""The fields of a transformers config: each is read by a mapping, changes nothing here, or is refused by its name.

The fields come as config.json or as a config object states them, in the words of transformers 4 or 5. Neither library
version judges them: what one of them does not know it would drop without a word.
"""

from typing import Any

from flexbert_core.schema import ConfigError

# What changes neither the trained weights' function nor their training here: settings of generation, of loading and of
# output, and what belongs to other tasks' heads.
_GENERATION = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
_LIBRARY = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    _num_labels architectures attn_implementation auto_map chunk_size_feed_forward decoder_start_token_id dtype
    experts_implementation gradient_checkpointing model_type name_or_path output_attentions output_hidden_states
    output_past prefix return_dict tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unsloth_version use_bfloat16 use_cache xla_device
"""
_OTHER_TASKS = """
    classifier_dropout finetuning_task id2label label2id num_labels problem_type sentence_transformers
    task_specific_params
"""
_POOLER = """
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
"""
# The last two are left-overs in the released config.json: ModernBERT has no such thing.
_MODERNBERT = """
    classifier_pooling deterministic_flash_attn reference_compile repad_logits_with_grad sparse_pred_ignore_index
    sparse_prediction layer_norm_eps position_embedding_type
"""
# Of our exports: rows before position 0 of the table, as the run had it.
POSITION_OFFSET = "flexbert_position_offset"
_IRRELEVANT = frozenset(f"{_GENERATION} {_LIBRARY} {_OTHER_TASKS}".split())
IRRELEVANT = {
    "bert": _IRRELEVANT | frozenset(_POOLER.split()),
    "roberta": _IRRELEVANT | {POSITION_OFFSET},
    "modernbert": _IRRELEVANT | frozenset(_MODERNBERT.split()),
}

# Of every architecture: fields that change the function, and the one value of each that is expressible.
ONLY: dict[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "pruned_heads": None,
    "per_layer_config": None,
    "quantization_config": None,
}
_HINTS = {"quantization_config": ": dequantize the model and save it"}

# Of transformers 4, where a config.json may leave them out; transformers 5 has the same under other names.
_MODERNBERT_DEFAULTS = {
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "global_attn_every_n_layers": 3,
}
OLDER_FIELDS = tuple(_MODERNBERT_DEFAULTS)
_MODERNBERT_5 = ("rope_parameters", "layer_types")


def _nothing(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


class Fields:
    """What a transformers config says, with its class's defaults. A field counts as used once it was read.

    model_type: one of bert, roberta, modernbert. given: field -> plain value.
    """

    def __init__(self, model_type: str, given: dict[str, Any]) -> None:
        self.model_type, self.given = model_type, given
        self._used: set[str] = set()
        self._defaults = _defaults(model_type)

    def __getitem__(self, name: str) -> Any:
        self._used.add(name)
        return self.given.get(name, self._defaults.get(name))

    def only(self, **wanted: Any) -> None:
        """Raise ConfigError for a field that is given otherwise. Nothing is as good as False: null, [] and {}."""
        for name, value in wanted.items():
            found = self[name]
            if name in self.given and found != value and not (_nothing(value) and _nothing(found)):
                hint = _HINTS.get(name, f", only {value!r}")
                raise ConfigError(f"{name}: {found!r} of the Hugging Face config has no counterpart here{hint}")

    def number(self, name: str, kinds: Any = int | float) -> Any:
        """A field that is calculated with here; our own schema checks the others."""
        return number(name, self[name], kinds)

    def float(self, name: str) -> float:
        """The same, where JSON may say 0 for 0.0."""
        return float(self.number(name))

    def flag(self, name: str) -> bool:
        if not isinstance(self[name], bool):
            raise ConfigError(f"{name}: {self[name]!r} of the Hugging Face config should be true or false")
        return self[name]

    def refuse_unused(self) -> None:
        """Raise ConfigError for a field that says something and that nobody here knows.

        It cannot be judged: a fork's own key changes what its weights compute, and transformers drops it silently.
        """
        for name in sorted(self.given.keys() - self._used - IRRELEVANT[self.model_type]):
            value = self.given[name]
            if not _nothing(value) and not (name in self._defaults and self._defaults[name] == value):
                raise ConfigError(
                    f"{name}: {value!r} of the Hugging Face config is not known for {self.model_type}, so whether the "
                    "weights need it cannot be told: delete the key if they do not"
                )


def number(name: str, value: Any, kinds: Any = int | float) -> Any:
    """The value. Raises ConfigError when it is no number."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name}: {value!r} of the Hugging Face config should be a number")
    return value


def _defaults(model_type: str) -> dict[str, Any]:
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(model_type).to_dict()
    if model_type == "modernbert":
        defaults = {name: value for name, value in defaults.items() if name not in _MODERNBERT_5}
        defaults |= _MODERNBERT_DEFAULTS
    return defaults


class LayerFields:
    """ModernBERT's thetas, RoPE scaling and pattern of layers, from either generation's fields.

    transformers 4: global_rope_theta, local_rope_theta, global_attn_every_n_layers. 5: rope_parameters, by kind of
    layer, and layer_types, one for each layer; it still reads the older fields where the newer are absent. Each version
    overlooks what it does not know, so folders that state both must agree. Raises ConfigError for what has no
    counterpart here.
    """

    KINDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        parameters = fields["rope_parameters"]
        self.parameters: dict[str, dict[str, Any]] = {}
        if parameters is not None:
            where = "rope_parameters"
            if not isinstance(parameters, dict) or parameters.keys() - self.KINDS.keys():
                raise ConfigError(f"{where}: {parameters!r} has no counterpart here, only {' and '.join(self.KINDS)}")
            for kind, given in parameters.items():
                if given is not None and not isinstance(given, dict):
                    raise ConfigError(f"{where}.{kind}: {given!r} should be a mapping")
                self.parameters[kind] = dict(given or {})

    def thetas(self) -> tuple[float, float]:
        """RoPE's base of global and of local layers."""
        full, sliding = (self._theta(kind, name) for kind, name in self.KINDS.items())
        if full is None:
            raise ConfigError("global_rope_theta: None of the Hugging Face config should be a number")
        return full, full if sliding is None else sliding

    def _theta(self, kind: str, older: str) -> float | None:
        fields, newer = self.fields, self.parameters.get(kind, {})
        before = None if fields[older] is None else fields.float(older)
        if "rope_theta" not in newer:
            return before
        if newer["rope_theta"] is None:  # as transformers 5 writes local_rope_theta: null, the same as the global one
            return None
        theta = float(number(f"rope_parameters.{kind}.rope_theta", newer["rope_theta"]))
        if older in fields.given and theta != (before if before is not None else fields[self.KINDS["full_attention"]]):
            raise ConfigError(
                f"{older}: {fields[older]!r} contradicts rope_parameters.{kind}, {theta!r}: transformers 4 takes the "
                "one, 5 the other: keep one of the two in config.json, and give from_hf the folder"
            )
        return theta

    def scaling(self) -> dict[str, Any]:
        """Fields of our position: none, or linear with the factor that both kinds share."""
        said = {}
        for kind in self.KINDS:
            given = {key: value for key, value in self.parameters.get(kind, {}).items() if key != "rope_theta"}
            rope_type = given.pop("rope_type", given.pop("type", "default"))
            given.pop("type", None)
            factor = given.pop("factor", None) if rope_type == "linear" else 1.0
            if given or rope_type not in ("default", "linear"):
                raise ConfigError(
                    f"rope_parameters.{kind}: {self.parameters[kind]!r} has no counterpart here, only default and "
                    "linear scaling"
                )
            said[kind] = (rope_type, float(number(f"rope_parameters.{kind}.factor", factor)))
        if len(set(said.values())) > 1:
            raise ConfigError(
                f"rope_parameters: {self.parameters!r} scale one kind of layer and not the other alike, which has no "
                "counterpart here"
            )
        rope_type, factor = said["full_attention"]
        return {"scaling": "linear", "scaling_factor": factor} if rope_type == "linear" else {}

    def period(self) -> Any:
        """Every how many layers one is global, from the first on."""
        fields = self.fields
        kinds, count = fields["layer_types"], fields.number("num_hidden_layers", int)
        said = fields["global_attn_every_n_layers"]
        if kinds is None:
            return said
        for period in ([said] if isinstance(said, int) and said > 0 else []) + list(range(1, count + 1)):
            if kinds == ["sliding_attention" if layer % period else "full_attention" for layer in range(count)]:
                break
        else:
            raise ConfigError(
                f"layer_types: {kinds!r} has no counterpart here, only full_attention at the first layer and every nth "
                f"after it, {count} in all"
            )
        if "global_attn_every_n_layers" in fields.given and period != said:
            raise ConfigError(
                f"global_attn_every_n_layers: {said!r} contradicts layer_types, {kinds!r}: transformers 4 takes the "
                "one, 5 the other: keep one of the two in config.json, and give from_hf the folder"
            )
        return period
