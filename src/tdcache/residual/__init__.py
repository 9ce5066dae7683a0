"""The residual stream of any model with canonical names: TensorDict in, TensorDict out.

Everything here works on kept values and never runs the model: only its norms and projections, as the maps that they
are. What is said of a sum is checked against what was kept, and refused where it does not hold.
"""

from tdcache.public_names import MissingName
from tdcache.residual.decomposition import accumulated, decompose, needed
from tdcache.residual.logits import logit_attribution, logit_lens, token_directions
from tdcache.residual.norm import apply_norm
from tdcache.residual.parts import Parts
from tdcache.residual.results import head_results, neuron_results, stack_activation
from tdcache.residual.tuned import TunedLens, tuned_lens

__all__ = [
    "Parts",
    "TunedLens",
    "accumulated",
    "apply_norm",
    "decompose",
    "head_results",
    "logit_attribution",
    "logit_lens",
    "needed",
    "neuron_results",
    "stack_activation",
    "token_directions",
    "tuned_lens",
]

__getattr__ = MissingName(__name__)
