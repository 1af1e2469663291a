"""A small trained decoder in plain Flax, the library's own example of "a user's model".

Nothing here imports the rest of jaxquant. `shipped` holds the trained model; see docs/model.md.
"""

from jaxquant.models.config import DecoderConfig
from jaxquant.models.generate import Generated, generate, generator, pad_prompts
from jaxquant.models.losses import next_token_loss, perplexity, slice_losses
from jaxquant.models.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "DecoderConfig",
    "Generated",
    "Sampling",
    "generate",
    "generator",
    "next_token_loss",
    "pad_prompts",
    "perplexity",
    "slice_losses",
]
