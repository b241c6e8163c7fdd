"""Heads for fine-tuning in transformers' words: classification of sequences and of tokens.

| | sequences | tokens |
|---|---|---|
| BERT | tanh(dense(first token)), which is its pooler, then the classifier | the classifier |
| RoBERTa | the same, under other names; it drops before the dense layer, too | the classifier |
| ModernBERT | norm(act(dense(first token or mean))), then the classifier | norm(act(dense(x))), which our head lacks |

Other heads, and other encoders, export with modeling_flexbert.py, which has them all.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flexbert.config import FlexBertConfig
from flexbert.hf.fields import Fields
from flexbert.hf.mappings import MAPPINGS, Mapping, at_padding_id, misfits
from flexbert_core.schema import ConfigError

TASKS = {"classification": "ForSequenceClassification", "tokens": "ForTokenClassification"}
"""Task of `build` -> what transformers' classes for it end with."""

# BERT's pooler, the only head for sequences that BERT and RoBERTa have.
_POOLER = {"pooling": "cls", "dense_bias": True, "activation": "tanh", "norm": False}
_CLASSIFIER = (r"head\.classifier\.", ("classifier.",))
_NAMES: dict[tuple[str, str], list[tuple[str, tuple[str, ...]]]] = {
    ("bert", "classification"): [(r"head\.dense\.", ("bert.pooler.dense.",)), _CLASSIFIER],
    ("bert", "tokens"): [_CLASSIFIER],
    ("roberta", "classification"): [
        (r"head\.dense\.", ("classifier.dense.",)),
        (r"head\.classifier\.", ("classifier.out_proj.",)),
    ],
    ("roberta", "tokens"): [_CLASSIFIER],
    ("modernbert", "classification"): [
        (r"head\.dense\.", ("head.dense.",)),
        (r"head\.norm\.", ("head.norm.",)),
        _CLASSIFIER,
    ],
}
_NO_TOKENS = (
    "transformers' ModernBERT for tokens has a dense layer and a norm before its classifier, which the head `tokens` "
    "has not"
)


def for_task(name: str, task: str) -> Mapping:
    """The mapping of an architecture's class for the task. Raises ConfigError where our head is none of that kind."""
    mapping = MAPPINGS[name]
    if task not in TASKS:
        return mapping
    if (name, task) not in _NAMES:
        raise ConfigError(f"task: {task!r}: {_NO_TOKENS}: load with task='encoder'")
    encoder = [names for names in mapping.names if not names[0].startswith(r"head\.")]
    architecture = mapping.architecture.removesuffix("ForMaskedLM") + TASKS[task]
    return mapping._replace(architecture=architecture, names=[*_NAMES[name, task], *encoder], repeats={})


def masked_counterpart(name: str, config: FlexBertConfig) -> FlexBertConfig:
    """The same encoder under the masked-token head that says the same to the architecture's config, for `misfits` and
    `config_to`. Raises ConfigError for a head that the architecture's class for its task does not compute."""
    head, title = config.head.model_dump(), MAPPINGS[name].title
    task = head["name"]
    if (name, task) not in _NAMES:
        raise ConfigError(f"head: {task!r} has no counterpart in Hugging Face's {title}")
    wanted = _POOLER if name != "modernbert" else {"norm": True}
    for field, value in wanted.items() if task == "classification" else ():
        if head[field] != value:
            raise ConfigError(
                f"head.{field}: {head[field]!r} has no counterpart in Hugging Face's {title}, only {value!r}"
            )
    masked: dict[str, Any] = {"name": "mlm", "dense_bias": True, "activation": "gelu"}
    if name == "modernbert":
        masked |= {"activation": head["activation"], "dense_bias": head["dense_bias"]}
    elif name == "bert":
        masked["activation"] = config.mlp.model_dump().get("activation", "gelu")
    return FlexBertConfig.from_dict({**config.to_dict(), "head": masked})


def task_misfits(name: str, config: FlexBertConfig, hf_config_of: Callable[..., Any]) -> list[str]:
    """As `mappings.misfits`, of a config with a head for fine-tuning."""
    try:
        return misfits(MAPPINGS[name], masked_counterpart(name, config), hf_config_of)
    except ConfigError as error:
        return [str(error)]


def task_fields(name: str, config: FlexBertConfig) -> dict[str, Any]:
    """Fields of the transformers config that the head has."""
    head = config.head.model_dump()
    fields = {"num_labels": head["num_labels"], "classifier_dropout": head["dropout"]}
    if name == "modernbert":
        fields["classifier_pooling"] = head["pooling"]
    return fields


def head_from(fields: Fields, config: FlexBertConfig, task: str) -> FlexBertConfig:
    """The config with the head that a transformers config says for the task, instead of its masked-token head."""
    for_task(fields.model_type, task)
    given = fields.given
    labels = given.get("id2label")
    count = len(labels) if isinstance(labels, dict) and labels else given.get("num_labels", 2)
    dropout = given.get("classifier_dropout")
    if dropout is None:
        dropout = 0.0 if fields.model_type == "modernbert" else fields["hidden_dropout_prob"]
    head: dict[str, Any] = {"name": task, "num_labels": count, "dropout": float(dropout)}
    if task == "classification" and fields.model_type == "modernbert":
        masked = config.head
        head |= {"pooling": given.get("classifier_pooling", "cls"), "norm": True}
        head |= {"activation": masked.activation, "dense_bias": masked.dense_bias}
    elif task == "classification":
        head |= _POOLER
    return FlexBertConfig.from_dict({**config.to_dict(), "head": head})


def at_padding_id_for(config: FlexBertConfig, task: str, pad_token_id: int | None) -> FlexBertConfig:
    """`mappings.at_padding_id`, also of a config with a head for fine-tuning."""
    if task == "mlm":
        return at_padding_id(config, pad_token_id)
    try:
        moved = at_padding_id(masked_counterpart("roberta", config), pad_token_id)
    except ConfigError:
        return config  # no RoBERTa
    return config if moved.position == config.position else config.model_copy(update={"position": moved.position})


def name_labels(hf_config: Any, config: FlexBertConfig, labels: Sequence[str] | None) -> None:
    """Put names of classes into a transformers config. Raises ConfigError unless there is one for each class."""
    if labels is None:
        return
    count = config.head.model_dump().get("num_labels", 0)
    if len(labels) != count or len(set(labels)) != count:
        raise ConfigError(f"labels: {len(labels)} for a model of {count} classes: give one name for each")
    hf_config.id2label = dict(enumerate(labels))
    hf_config.label2id = {label: number for number, label in enumerate(labels)}
