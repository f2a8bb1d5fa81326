"""What every detector on one frozen backbone has in common."""

from collections.abc import Mapping

from torch import Tensor, nn

from models.backbones import Backbone


class OnBackbone(nn.Module):
    """A detector that stands on one frozen backbone.

    Attributes:
        backbone: set by the subclass; its weights are no part of the detector's learning.
    """

    backbone: Backbone

    def load_backbone_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the backbone's weights in timm's naming.

        Raises:
            ValueError: if a key is missing, unknown or has another shape.
        """
        self.backbone.load_weights(state_dict)

    def learnable_parameters(self) -> list[nn.Parameter]:
        """Return everything but the backbone, for a descent that changes all of it."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
