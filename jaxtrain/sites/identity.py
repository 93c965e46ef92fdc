"""Lists the fields of a config that must be equal at all sites of a job."""

import json
from fractions import Fraction

from jaxtrain.config.train_config import TrainConfig, flatten_without

# Fields, or sections (NAME.), that may differ between the sites of a job: those of one machine, and
# numbers of steps, because a faster site takes more of them in the same time.
SITE_FIELDS = (
    *("steps", "accumulation", "data.batch", "data.prefetch", "mesh.", "kernels.", "strict"),
    *("model.attention", "optim.total_steps", "optim.warmup_steps", "sites.period", "sites.delay"),
    *("log_every", "eval_every", "eval_from", "eval_tokens", "save_every", "keep_last"),
    *("keep_every", "diagnose_every", "max_bad_steps", "checkpoint.", "sample.", "measure."),
    *("eval.", "profile.", "export.", "notify.", "workdir", "compile_cache", "deterministic"),
    "weights",
)
STARTS = (
    "starts of the fragments as shares of sites.period (equal if each site's period is a multiple "
    "of sites.fragments)"
)


def shared_fields(config: TrainConfig) -> dict[str, str]:
    """Returns {field: value} of all that must be equal at all sites of a job."""
    fields, sites = flatten_without(config, SITE_FIELDS), config.sites
    fields["steps / sites.period"] = str(Fraction(config.steps, sites.period))
    if sites.fragments > 1:
        # With other rounding, an extended run would have other numbers of rounds.
        starts = [f * sites.period // sites.fragments for f in range(sites.fragments)]
        fractions = [str(Fraction(start, sites.period)) for start in starts]
        fields[STARTS] = " ".join(fractions)
    return {name: json.dumps(value) for name, value in fields.items()}
