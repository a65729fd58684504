"""A model that was built without the rotary scaling of the flags is refused."""

from argparse import Namespace

import pytest
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_rmt.model.rotary import check_rotary_scaling
from tests.tiny_model import build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")


def _arguments(**changes: object) -> Namespace:
    flags = {
        "position_embedding_type": "rope",
        "use_rope_scaling": True,
        "multi_latent_attention": False,
        "rope_scaling_factor": 32.0,
        "kv_channels": 64,
        "rotary_percent": 1.0,
        "rotary_base": 500000,
    }
    return Namespace(**flags | changes)


def _model(**scaling: object):
    model = build_model()
    model.rotary_pos_emb = RotaryEmbedding(
        kv_channels=64,
        rotary_percent=1.0,
        rotary_base=500000,
        use_cpu_initialization=True,
        **scaling,
    )
    return model


def test_the_scaling_of_the_flags_is_accepted():
    check_rotary_scaling(_arguments(), _model(rope_scaling=True, rope_scaling_factor=32.0))
    check_rotary_scaling(_arguments(use_rope_scaling=False), _model())
    # Its layers have a table of their own.
    check_rotary_scaling(_arguments(multi_latent_attention=True), _model())


@pytest.mark.parametrize("scaling", [{"rope_scaling": True}, {}], ids=["factor 8", "none"])
def test_another_scaling_is_refused(scaling: dict[str, object]):
    sentence = r"--rope-scaling-factor 32 did not reach the model: .*; set config\.rope_scaling_f"
    with pytest.raises(ValueError, match=sentence):
        check_rotary_scaling(_arguments(), _model(**scaling))
