"""The slots that a run file fills from rooms above this one: their names are known here, their entries there.

| slot | entry | constructed with |
|---|---|---|
| callbacks | composer.core.Callback: watches a run | plan, folder |
| algorithms | composer.core.Algorithm: changes how a run trains | plan, folder |
| loggers | composer.loggers.LoggerDestination: where metrics go | name, run, folder |

plan: the run's PhasePlan. folder: runs/NAME, for files of its own. name: of the run. run: its resolved config, as plain
values.
A class with a nested `Config` (schema.Component) and the decorator `@CALLBACKS.register("name")` is an entry; so is a
function with an attribute `Config`. It may stand in any file that the run file `imports`.
"""

from schema import Registry

CALLBACKS = Registry("callbacks", filled_by="callbacks.entries")
ALGORITHMS = Registry("algorithms", filled_by="callbacks.entries")
LOGGERS = Registry("loggers", filled_by="callbacks.entries")
