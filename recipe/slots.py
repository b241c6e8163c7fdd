"""The slots that a run file fills from rooms above this one: their names are known here, their entries there.

| slot | entry | constructed with |
|---|---|---|
| optimizer | a function or class that gives a torch.optim.Optimizer | model, lr |
| parallelism | training.parallelism.Parallelism: what each rank keeps | world_size |
| objective | training.objectives.Objective: the loss of a batch | plan |
| evaluations | training.evaluations.Evaluation: scores of the model | run, plan, streams, folder |
| callbacks | composer.core.Callback: watches a run | plan, folder |
| algorithms | composer.core.Algorithm: changes how a run trains | plan, folder |
| loggers | composer.loggers.LoggerDestination: where metrics go | name, run, folder |

model: the FlexBertForMaskedLM. lr: peak learning rate. plan: the run's PhasePlan. folder: runs/NAME, for files of its
own. name: of the run. run: its resolved config, as plain values, for evaluations as the RunConfig. streams: the opened
training streams.
An objective may have the class attribute `masking`, the name of the one masking that it trains on, which its phases
then have and no others; and a static method `check(config, run)` that raises ValueError `key: what is wrong: fix` for a
RunConfig that it cannot train.
A class with a nested `Config` (flexbert_core.schema.Component) and the decorator `@CALLBACKS.register("name")` is an
entry; so is a function with an attribute `Config`. It may stand in any file that the run file `imports`.
"""

from flexbert_core.schema import Registry

OPTIMIZERS = Registry("optimizer", filled_by=["training.optim.optimizers"])
"""An entry with `works_on_shards = True` makes right steps where a rank holds a part of each tensor; under
trainer.parallelism fsdp2 others are refused. One that keeps more than two numbers of each parameter says how many more
of a whole model in a static method `more_states(model)`."""
PARALLELISMS = Registry("parallelism", filled_by=["training.parallelism"])
OBJECTIVES = Registry("objective", filled_by=["training.objectives"])
EVALUATIONS = Registry(
    "evaluations",
    noun="evaluation",
    filled_by=["training.evaluations", "training.document_losses", "training.detection", "evals.background"],
)
CALLBACKS = Registry("callbacks", noun="callback", filled_by=["callbacks.entries"])
ALGORITHMS = Registry("algorithms", noun="algorithm", filled_by=["callbacks.entries"])
LOGGERS = Registry("loggers", noun="logger", filled_by=["callbacks.entries"])
