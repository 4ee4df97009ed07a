"""variants/pixels.py: JEPA's networks, VideoMAE's patches, and what is between them."""
import torch

import jepa
from jepa import JEPA, EncoderOptions
from model import tokens_of
from variants.pixels import PRESETS, Decoder, Pixels
from videomae import normalized_pixels, patchify

SMALL = dict(encoder='statistics', widths=(4, 4, 4, 8), decoder_width=8)


def test_it_differs_from_jepa_by_the_target_alone():
    """Encoder and predictor have JEPA's names, shapes and initial values; nano's settings of them are JEPA's."""
    built = []
    for cls, settings in (JEPA, dict(encoder='statistics')), (Pixels, dict(encoder='statistics')):
        torch.manual_seed(0)
        own = dict(widths=(4, 4, 4, 8), layer_scale=1.0, **settings)
        built.append({k: v for k, v in cls(3, **own).state_dict().items() if not k.startswith('decoder')})
    assert built[0].keys() == built[1].keys() and all(torch.equal(built[0][k], built[1][k]) for k in built[0])

    for name in [*EncoderOptions.__dataclass_fields__, 'residual', 'batch', 'steps']:
        assert PRESETS['nano'].get(name) == jepa.PRESETS['nano'].get(name), name
    assert PRESETS['nano']['views'] == 'paired'
    assert (PRESETS['nano']['lr'], jepa.PRESETS['nano']['lr']) == (1e-3, 3e-3)         # each the best of three


def image_of(patches, shape, patch):
    """The inverse of `patchify`, for tubelets of two frames: fields of `shape` (B, C, T, H, W)."""
    B, C, T, H, W = shape
    x = patches.view(B, T // 2, H // patch, W // patch, 2, patch, patch, C)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(shape)


def test_every_pixel_is_made_from_the_token_it_lies_in():
    """The decoder's patches lie where their token lies: changing one token changes its 16 x 16 pixels and no other."""
    torch.manual_seed(0)
    for patch in 8, 16, 4:
        decoder, p = Decoder(6, 8, patch, 2 * patch * patch * 3), torch.randn(2, 6, 2, 3)
        shape = 2, 3, 16, 32, 48
        image = lambda p: image_of(decoder(p), shape, patch)
        other = p.clone()
        other[1, :, 1, 2] += 1
        changed = (image(p) != image(other)).any(1).any(1)               # (2, H, W)
        expected = torch.zeros(2, 32, 48, dtype=torch.bool)
        expected[1, 16:, 32:] = True
        assert torch.equal(changed, expected), patch


def test_the_loss_is_the_error_of_normalised_pixels():
    """Over all patches of the next frames."""
    torch.manual_seed(0)
    model, (context, target) = Pixels(3, **SMALL, residual=True).double(), torch.randn(2, 2, 3, 16, 32, 32).double()
    out = model(context, target)
    z = model.encoder(context)
    pixels = normalized_pixels(patchify(target, 2, 8))
    expected = (model.decoder(z + model.predictor(z)) - pixels).square().mean()
    assert torch.allclose(out['loss'], expected)
    assert torch.equal(model.embedding, z.detach()) and tokens_of(model, context).shape == (2, 4, 8)
    model.residual = False
    assert not torch.allclose(model(context, target)['loss'], expected)
