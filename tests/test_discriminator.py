"""The discriminator alone: the published layers, what a patch is, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tokenizer import discriminator, losses, pixels


def frames(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def count(layers):
    init = functools.partial(discriminator.init, layers, 64, "batch")
    return sum(x.size for x in jax.eval_shape(init, jax.random.key(0)).values())


def test_it_is_as_large_as_published():
    """pix2pix prints 2,768,705 for 3 layers and inputs of 6 channels: 3 x 64 x 4 x 4 more."""
    assert count(3) == 2_768_705 - 3072
    assert count(2) == 663_361


def test_it_computes_what_torch_does():
    params = discriminator.init(2, 8, "batch", jax.random.key(0))
    params = {name: value + 0.1 * frames(len(name), *value.shape) for name, value in params.items()}
    layers, channels = [], [3, 8, 16, 32, 1]
    for i, stride in enumerate((2, 2, 1, 1)):
        layers.append(torch.nn.Conv2d(*channels[i : i + 2], 4, stride, 1, bias=i in (0, 3)))
        name = f"convs.{i}" if i < 3 else "conv_out"
        kernel = np.moveaxis(np.asarray(params[f"{name}.kernel"]), (-1, -2), (0, 1))
        layers[-1].weight.data = torch.from_numpy(np.ascontiguousarray(kernel))
        if i in (0, 3):
            layers[-1].bias.data = torch.from_numpy(np.array(params[f"{name}.bias"]))
        if i in (1, 2):
            layers.append(torch.nn.BatchNorm2d(channels[i + 1]))
            layers[-1].weight.data = torch.from_numpy(np.array(params[f"norms.{i - 1}.scale"]))
            layers[-1].bias.data = torch.from_numpy(np.array(params[f"norms.{i - 1}.bias"]))
        if i < 3:
            layers.append(torch.nn.LeakyReLU(0.2))
    x_BHWC = frames(1, 4, 24, 16, 3)
    with torch.no_grad():
        want = torch.nn.Sequential(*layers).train()(torch.from_numpy(x_BHWC).movedim(-1, 1))
    got_Bhw = discriminator.merge(2, 8, "batch", params)(x_BHWC)
    assert got_Bhw.shape == (4, 4, 2)
    np.testing.assert_allclose(got_Bhw, want[:, 0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers, size", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, size):
    params = discriminator.init(layers, 4, "none", jax.random.key(0))
    critic = discriminator.merge(layers, 4, "none", params)
    x_BHWC = frames(2, 1, 96, 96, 3)
    place = 96 // 2**layers // 2
    seen_BHWC = jax.grad(lambda x_BHWC: critic(x_BHWC)[0, place, place])(x_BHWC) != 0
    assert seen_BHWC.any((0, 1, 3)).sum() == seen_BHWC.any((0, 2, 3)).sum() == size


def test_batch_norm_mixes_frames_and_none_does_not():
    x_BHWC = frames(3, 4, 16, 16, 3)
    for norm, mixes in (("batch", True), ("none", False)):
        params = discriminator.init(1, 4, norm, jax.random.key(0))
        critic = discriminator.merge(1, 4, norm, params)
        apart = np.abs(critic(x_BHWC)[:2] - critic(x_BHWC[:2])).max() > 1e-4
        assert apart == mixes


def toy(seed):
    """Real frames are a square of one colour on another; others are those with noise."""
    rng = np.random.default_rng(seed)
    x_BHWC = np.broadcast_to(rng.integers(0, 256, (8, 1, 1, 3)), (8, 16, 16, 3)).copy()
    x_BHWC[:, 4:12, 4:12] = rng.integers(0, 256, (8, 1, 1, 3))
    real_BHWC = pixels.to_float(jnp.asarray(x_BHWC, jnp.uint8))
    return real_BHWC, real_BHWC + 0.3 * rng.standard_normal(real_BHWC.shape)


@pytest.mark.parametrize("norm", discriminator.NORMS)
def test_it_learns_to_tell_real_from_fake(norm):
    params = discriminator.init(1, 16, norm, jax.random.key(0))
    optimizer = optax.adam(3e-3, 0.5, 0.9)
    moments = optimizer.init(params)

    def logits(params, real_BHWC, fake_BHWC):
        critic = discriminator.merge(1, 16, norm, params)
        return critic(real_BHWC), critic(fake_BHWC)

    @jax.jit
    def update(params, moments, *batches):
        loss, grads = jax.value_and_grad(lambda p: losses.hinge(*logits(p, *batches)))(params)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), moments, loss

    assert 0.8 < losses.hinge(*logits(params, *toy(0))) < 1.2  # by chance 1
    for step in range(200):
        params, moments, _ = update(params, moments, *toy(step))
    unseen = [losses.hinge(*logits(params, *toy(seed))) for seed in range(900, 908)]
    assert np.mean(unseen) < 0.4


def test_what_cannot_be():
    with pytest.raises(ValueError, match="^no discriminator of 0 layers with norm 'batch'; take"):
        discriminator.init(0, 8, "batch", jax.random.key(0))
    with pytest.raises(ValueError, match="with norm 'group'; take 1 .* and one of batch, none$"):
        discriminator.init(2, 8, "group", jax.random.key(0))
    critic = discriminator.merge(2, 4, "none", discriminator.init(2, 4, "none", jax.random.key(0)))
    assert critic(frames(0, 1, 12, 12, 3)).shape == (1, 1, 1)
    message = "^a discriminator of 2 layers needs 12x12 pixels, not 11x16; take fewer layers or"
    with pytest.raises(ValueError, match=message):
        critic(frames(0, 1, 11, 16, 3))
    with pytest.raises(ValueError, match="^r1 10.0 with norm 'batch': .* take norm 'none'$"):
        losses.Adversarial(weight=0.1, r1=10.0).init(jax.random.key(0))
