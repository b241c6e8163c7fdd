"""To and from Hugging Face transformers.

mappings.py says which architectures it has a class for. The others travel with modeling_flexbert.py, and those with
parts from outside also with modeling_with_parts.py.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flexbert.config import FlexBertConfig
from flexbert.encoder import FlexBertEncoder
from flexbert.hf import parts as from_outside
from flexbert.hf.fields import OLDER_FIELDS, POSITION_OFFSET, Fields
from flexbert.hf.mappings import MAPPINGS, Mapping, config_of, lost_dropouts, misfits
from flexbert.hf.read import OwnFields, read_fields, read_model, read_weights
from flexbert.hf.state import from_hf_state, moved_table, require_numbers, to_hf_state
from flexbert.hf.task_heads import (
    TASKS,
    at_padding_id_for,
    for_task,
    head_from,
    masked_counterpart,
    name_labels,
    task_fields,
    task_misfits,
)
from flexbert.hf.tokenizer import load_tokenizer, save_tokenizer, token_ids
from flexbert.hf.verify import PARITY_FILE, Comparison, Exportable, task_of, verify_export
from flexbert.model import FlexBertForMaskedLM, Model, build
from flexbert.registry import HEADS
from flexbert.tasks import FlexBertForSequenceClassification, FlexBertForTokenClassification
from flexbert_core.durable import new_folder
from flexbert_core.schema import ConfigError, RunError, named, validate

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
MODELING_FILE = _HERE / "modeling_flexbert.py"
_ACTIVATIONS_FILE = _HERE.parent / "activations.py"
# What an export holds, beside modeling files and PARITY_FILE.
_FILES = ("config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json")
_FILES += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json")
_FILES += ("merges.txt", "chat_template.jinja")


@overload
def from_hf(
    source: str | Path | Any, task: Literal["mlm"] = "mlm", trust_remote_code: bool = False
) -> FlexBertForMaskedLM: ...
@overload
def from_hf(source: str | Path | Any, task: Literal["encoder"], trust_remote_code: bool = False) -> FlexBertEncoder: ...
@overload
def from_hf(
    source: str | Path | Any, task: Literal["classification"], trust_remote_code: bool = False
) -> FlexBertForSequenceClassification: ...
@overload
def from_hf(
    source: str | Path | Any, task: Literal["tokens"], trust_remote_code: bool = False
) -> FlexBertForTokenClassification: ...
def from_hf(source: str | Path | Any, task: str = "mlm", trust_remote_code: bool = False) -> Model:
    """A model with the weights of a transformers model, or of a folder that holds one in safetensors.

    source: BERT, RoBERTa, ModernBERT, saved by transformers 4 or 5, or what `to_hf` wrote (its modeling file is not
    run). task: "mlm", or "encoder" for models without a masked-token head, or to leave it out; "classification" (of
    sequences) or "tokens" for a model that was fine-tuned so; poolers and other tasks' heads are left out. Weights are
    copied, as float32. Nothing is downloaded.
    trust_remote_code: run the files of parts from outside that an export of ours carries, once each is the one that
    config.json has the sha256 of. Without, no code of the folder runs: such parts must have been imported.
    Raises ConfigError naming the field when the architecture cannot be expressed or a field is not known, and naming
    the weight or file when weights are missing, left over, of another shape, quantized or an adapter's.
    """
    if task not in ("mlm", "encoder", *TASKS):
        raise ConfigError(f"task: {task!r}: transformers' weights are for mlm, encoder, {' or '.join(TASKS)}")
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        with named(folder):
            fields = read_fields(folder)
            if trust_remote_code and isinstance(fields, OwnFields) and fields.parts:
                from_outside.register(from_outside.read(folder, fields.parts), folder)
            return _converted(fields, lambda: read_weights(folder), task, "config.json")
    fields, weights = read_model(source)
    return _converted(fields, lambda: weights, task, "model")


def read_config(folder: Path) -> FlexBertConfig:
    """The architecture of a folder that `from_hf` reads, without its weights. Raises ConfigError as that does."""
    with named(folder):
        return _config(read_fields(folder), "config.json")


def _config(fields: Fields | OwnFields, place: str) -> FlexBertConfig:
    if isinstance(fields, OwnFields):
        return _own_config(fields, place)
    return validate(FlexBertConfig, config_of(fields), place)


def _converted(fields: Fields | OwnFields, weights: Callable[[], dict[str, Tensor]], task: str, place: str) -> Model:
    """The model of a transformers config. place: of the config, in messages. The weights are read once the config is
    known to make sense here."""
    config = _config(fields, place)
    if isinstance(fields, Fields) and task in TASKS:
        config = head_from(fields, config, task)
    result = _without_weights(config, task)
    wanted = {name: tensor.shape for name, tensor in result.state_dict().items()}
    given = weights()
    if isinstance(fields, OwnFields):
        for name, tensor in given.items():
            require_numbers(name, tensor)
        state = _own_state(given, list(wanted), task)
        for name, tensor in state.items():
            if tensor.shape != wanted[name]:
                shapes = f"{tuple(tensor.shape)} in the weights, {tuple(wanted[name])} by the config"
                raise ConfigError(f"{name}: {shapes}: they are of different models")
    else:
        ours = {f"encoder.{name}" if task == "encoder" else name: shape for name, shape in wanted.items()}
        mapping = for_task(fields.model_type, task)
        state = dict(zip(wanted, from_hf_state(mapping, given, ours, task).values(), strict=True))
        if (offset := fields.given.get(POSITION_OFFSET)) is not None:
            table, before = (
                next(name for name in state if name.endswith("position.table.weight")),
                config.position.offset,
            )
            result = _without_weights(validate(FlexBertConfig, _at_offset(config, offset), place), task)
            state[table] = moved_table(state[table], before, offset)
    result.load_state_dict(state, assign=True)
    return result


def _own_config(fields: OwnFields, place: str) -> FlexBertConfig:
    for file in from_outside.registered_otherwise(fields.parts):
        log.warning("%s: registers parts here, and is not the file of this name that the export carries", file)
    try:
        return validate(FlexBertConfig, fields.node(), place)
    except ConfigError as error:
        if not fields.parts:
            raise
        files = ", ".join(fields.parts)
        hint = "name them in `imports` of a run file; from_hf(..., trust_remote_code=True) runs them"
        raise ConfigError(f"{error}\n{place}: parts: the model has parts of {files}: {hint}") from None


def _without_weights(config: FlexBertConfig, task: str) -> Any:
    # What a part from outside computes when it is made, and keeps beside its weights, must be there.
    with contextlib.nullcontext() if from_outside.outside(config) else torch.device("meta"):
        return build(config, task)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _at_offset(config: FlexBertConfig, offset: Any) -> dict[str, Any]:
    node = config.to_dict()
    return {**node, "position": {**node["position"], "offset": offset}}


def _own_state(given: dict[str, Tensor], wanted: list[str], task: str) -> dict[str, Tensor]:
    """Weights that already have our names: of a whole model, or, without `encoder.`, of an encoder.

    transformers' model of a tied decoder names the token table twice: one of them goes, if they are equal.
    """
    if "head.output.weight" in given and "head.output.weight" not in wanted:
        table = given.get("encoder.embedding.tokens.weight")
        if table is not None and torch.equal(table, given["head.output.weight"]):
            given = {name: tensor for name, tensor in given.items() if name != "head.output.weight"}
    if task == "encoder":
        given = {name.removeprefix("encoder."): tensor for name, tensor in given.items()}
        given = {name: tensor for name, tensor in given.items() if not name.startswith("head.")}
    if odd := sorted(given.keys() ^ set(wanted)):
        raise ConfigError(f"{odd[0]}: {'missing' if odd[0] in wanted else 'has no place'} in this model")
    return {name: given[name].to("cpu", torch.float32, copy=True) for name in wanted}


def to_hf(
    model: Exportable,
    tokenizer: Any,
    out_dir: str | Path,
    card: str | None = None,
    labels: Sequence[str] | None = None,
) -> Comparison:
    """Write a folder that transformers loads: config.json, model.safetensors, the tokenizer, README.md; parity.json
    says how far its logits are from the model's.

    An architecture without a class in transformers also gets modeling_flexbert.py, for trust_remote_code=True; one with
    parts from outside their files, too, whose sha256 are in config.json and README.md.
    tokenizer: a transformers tokenizer, or a folder that AutoTokenizer loads; its special ids go into the config, and
    the model's longest sequence into its copy. card: text of README.md; default: what the architecture
    alone tells. labels: names of a classifier's classes.
    The folder is written beside `out_dir`, loaded back by transformers (in a process without FlexBERT, if it carries
    code), its logits compared with `model`'s (float32, within 1e-4), and only then renamed to `out_dir`; an earlier
    export of ours there is replaced, anything else refused, and so is one with files that are not of it.
    Returns what was compared, and by how much it differs. Raises ConfigError for a part from outside that cannot travel
    (naming it), a tokenizer or labels that do not fit or an `out_dir` that is something else; RunError when the logits
    differ or the disk is full. Then nothing new is under `out_dir`.
    """
    model = getattr(model, "_orig_mod", model)  # compiled
    if not isinstance(model, Exportable):
        raise ConfigError(f"{type(model).__name__}: expected a FlexBertForMaskedLM, or a model for classification")
    out_dir = Path(out_dir).expanduser()
    if out_dir.exists() and (foreign := _foreign(out_dir)):
        raise ConfigError(f"{out_dir}: exists and is not an export ({foreign}): choose another folder, or remove it")
    if tokenizer is None:
        raise ConfigError("tokenizer: None: an export holds one: give a transformers tokenizer, or its folder")
    tokenizer = load_tokenizer(tokenizer)
    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in model.state_dict().items()}
    ids = token_ids(model.config, tokenizer)
    task = task_of(model)
    config = at_padding_id_for(model.config, task, ids["pad_token_id"])
    hf_config, mapping = transformers_config(config, ids)
    name_labels(hf_config, config, labels)
    as_masked = config if mapping is None or task == "mlm" else masked_counterpart(hf_config.model_type, config)
    lost = [] if mapping is None else lost_dropouts(as_masked, hf_config)
    if lost:
        verb, title = "has" if len(lost) == 1 else "have", MAPPINGS[hf_config.model_type].title
        message = "%s: %s no field in Hugging Face's %s: fine-tuning the export drops nothing there"
        log.warning(message, ", ".join(lost), verb, title)
    if mapping is not None:
        if config is not model.config:
            table, before = "encoder.position.table.weight", model.config.position.offset
            state[table] = moved_table(state[table], before, config.position.offset)
            setattr(hf_config, POSITION_OFFSET, before)
        state = to_hf_state(mapping, state)

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_folder(out_dir) as folder:
        hf_config.save_pretrained(folder)
        more = ""
        if mapping is None:
            parts = from_outside.parts_of(config)
            _write_code(folder, parts)
            more = from_outside.card(parts) if parts.files else ""
        else:
            _state_older_fields(folder / "config.json", mapping.config_to(as_masked))
        try:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # its own kind for what the disk refuses
            raise RunError(f"{out_dir}: {error}: make room there, or choose another place") from None
        save_tokenizer(tokenizer, model.config, folder)
        compared = verify_export(model, folder, hf_config.pad_token_id, carries_code=mapping is None)
        title = "FlexBERT" if mapping is None else mapping.title
        text = default_card(model, out_dir.name, title, lost) if card is None else card
        (folder / PARITY_FILE).write_text(json.dumps(compared.facts(), indent=1) + "\n")
        (folder / "README.md").write_text(text + more)
    return compared


def _foreign(path: Path) -> str | None:
    """Why what lies there is not what `to_hf` wrote and nobody has added to; None: it is."""
    missing = [name for name in (*_FILES[:2], PARITY_FILE) if not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    known = {*_FILES, PARITY_FILE}
    more = sorted(file.name for file in path.iterdir() if file.name not in known and file.suffix != ".py")
    return f"{more[0]} is not of one" if more else None


def _write_code(folder: Path, parts: from_outside.Parts) -> None:
    """The modeling files, which import one another as files of one folder, and those of the parts."""
    text = MODELING_FILE.read_text(encoding="utf-8")
    text = text.replace("from flexbert.activations import", "from .activations import")
    (folder / MODELING_FILE.name).write_text(text, encoding="utf-8")
    shutil.copy(_ACTIVATIONS_FILE, folder)
    if parts.files:
        for name in from_outside.WITH_PARTS_FILES:
            shutil.copy(_HERE / name, folder)
        from_outside.write(parts, folder)


def _state_older_fields(file: Path, fields: dict[str, Any]) -> None:
    """Add to config.json what transformers 5 has renamed and 4 would take its defaults for."""
    node = json.loads(file.read_text(encoding="utf-8"))
    node = {**{name: value for name, value in fields.items() if name in OLDER_FIELDS}, **node}
    file.write_text(json.dumps(node, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def transformers_config(config: FlexBertConfig, ids: dict[str, int | None]) -> tuple[Any, Mapping | None]:
    """The config to export, and how weights are renamed; None: they keep our names, for modeling_flexbert.py.

    Raises ConfigError for a part from outside that cannot travel.
    """
    from transformers import AutoConfig

    common = {"dtype": "float32", **ids}
    reasons = []
    task = HEADS.entries[config.head.name].task
    for name, mapping in MAPPINGS.items():

        def of(name: str = name, **fields: Any) -> Any:
            return AutoConfig.for_model(name, **{**fields, **common})

        faults = misfits(mapping, config, of) if task == "mlm" else task_misfits(name, config, of)
        if not faults:
            of_task = for_task(name, task)
            own = config if task == "mlm" else masked_counterpart(name, config)
            fields = {**of_task.config_to(own), **(task_fields(name, config) if task in TASKS else {})}
            return of(**fields, architectures=[of_task.architecture]), of_task
        reasons.append(faults[0])
    parts = from_outside.parts_of(config)
    log.info("the export carries its own modeling file: %s", "; ".join(reasons))
    from flexbert.hf import modeling_flexbert

    node = config.to_dict()
    node["init"] = {"name": "default"}  # says nothing about trained weights, and may name a folder of this machine
    names = {"AutoConfig": "FlexBertConfig", "AutoModel": "FlexBertModel"}
    names |= {
        f"AutoModel{task}": f"FlexBert{task}"
        for task in ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
    }
    file = "modeling_with_parts" if parts.files else "modeling_flexbert"
    more: dict[str, Any] = {"parts": parts.digests()} if parts.files else {}
    hf_config = modeling_flexbert.FlexBertConfig(
        node,
        **common,
        **more,
        auto_map={
            auto: f"{'modeling_flexbert' if auto == 'AutoConfig' else file}.{name}" for auto, name in names.items()
        },
        architectures=[f"FlexBert{TASKS.get(task, 'ForMaskedLM')}"],
    )
    return hf_config, None


def carries_code(config: FlexBertConfig) -> bool:
    """Whether an export of this architecture brings its own modeling file, for trust_remote_code=True. Raises
    ConfigError as `to_hf` does."""
    return transformers_config(config, {})[1] is None


def check_exportable(config: FlexBertConfig) -> None:
    """Raise ConfigError, one line, for a part from outside that an export cannot carry."""
    from_outside.parts_of(config)


def default_card(model: Exportable, name: str, title: str, lost: list[str]) -> str:
    """README.md of an export: what the architecture tells, and how to load it."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trust = ", trust_remote_code=True" if title == "FlexBERT" else ""
    task = task_of(model)
    loader = f"AutoModel{TASKS.get(task, 'ForMaskedLM')}"
    kind = {"classification": "A classifier of texts", "tokens": "A classifier of tokens"}
    what, made = kind.get(task, "A masked language model"), "fine-tuned" if task in TASKS else "pretrained"
    pipeline = {"classification": "text-classification", "tokens": "token-classification"}.get(task, "fill-mask")
    without = f"\nFine-tuning drops nothing at {', '.join(lost)}, which had dropout in pretraining.\n" if lost else ""
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
---

# {name}

{what} of the {title} architecture, {made} with FlexBERT.

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| vocabulary | {config.vocab_size:,} |
| longest sequence | {config.max_position_embeddings:,} tokens |
{without}
```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```
"""
