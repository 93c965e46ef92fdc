"""Complete optimizers for any parameter tree, without a config: muon(learning_rate=0.02), ...

docs/own_loop.md shows them in loops of Flax, Equinox and plain JAX. A new recipe is one call of
`complete_optimizer`, in its own module.
"""

from jaxtrain.optim.accelerated_lmo import accelerated_lmo
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.default_axes import resolve_axes
from jaxtrain.optim.describe import describe, group_rows
from jaxtrain.optim.muon import muon, scale_by_muon
from jaxtrain.optim.muown import muown
from jaxtrain.optim.norm_preserving import adam_h, muon_h
from jaxtrain.optim.normuon import normuon
from jaxtrain.optim.soap import scale_by_soap, soap
from jaxtrain.optim.soap_muon import scale_by_soap_muon, soap_muon
from jaxtrain.optim.tail_average import tail_average

__all__ = [
    "accelerated_lmo",
    "adam_h",
    "describe",
    "eval_params",
    "group_rows",
    "muon",
    "muon_h",
    "muown",
    "normuon",
    "resolve_axes",
    "scale_by_muon",
    "scale_by_soap",
    "scale_by_soap_muon",
    "soap",
    "soap_muon",
    "tail_average",
]
