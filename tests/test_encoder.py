"The encoder: counts, determinism, mask leak, attention, other image sizes, saving, loading, and bf16."
import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import gap
from safetensors.torch import load_file, save_file
from torch import nn

from scott import encoder as encoder_module
from scott.augment import eval_view
from scott.data.sets import ImageSet
from scott.encoder import (Attention, Block, Encoder, Transformer, feed_forward, patch_grid, scott_7_16, scott_12_16,
                           sincos_positions, vit_12_16)
from scott.probe.features import encode

SMALL = dict(img_size=64, embed_dim=64, depth=2, num_heads=4)


def small(seed=0, **kwargs):
    "A small encoder in evaluation mode."
    torch.manual_seed(seed)
    return Encoder(**{**SMALL, **kwargs}).eval()


def images_and_keep(batch=2, size=(64, 64), visible=7, seed=1):
    "Random images and masks with the same visible count in every image."
    g = torch.Generator().manual_seed(seed)
    n = size[0] * size[1] // 256
    keep = torch.rand(batch, n, generator=g).argsort(1) < visible
    return torch.randn(batch, 3, *size, generator=g), keep


# parameters
@pytest.mark.parametrize('make, count', [(scott_12_16, 22_447_680), (scott_7_16, 13_600_320), (vit_12_16, 21_529_344)])
def test_parameter_counts(make, count):
    encoder = make()
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert encoder.grid == (14, 14)


def test_presets_take_arguments():
    encoder = scott_7_16(depth=1, img_size=64, embed_dim=32)
    assert encoder.depth == 1 and encoder.grid == (4, 4) and encoder.embed_dim == 32


def test_no_biases_no_learned_norms_no_stored_positions():
    encoder = small(reg_tokens=3)
    names = [name for name, _ in encoder.named_parameters()]
    assert set(names) == set(encoder.state_dict())
    assert not [name for name in names if 'bias' in name or 'norm' in name or 'pos' in name]
    assert encoder.transformer.registers.shape == (1, 3, 64)


def test_every_parameter_gets_a_gradient():
    encoder = small(reg_tokens=2)
    images, keep = images_and_keep()
    encoder(images, keep).square().mean().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize('blocks_before', [0, 12])
def test_initial_weights(blocks_before):
    torch.manual_seed(0)
    net = Transformer((2, 2), 128, 3, 4, blocks_before=blocks_before)
    for l, block in enumerate(net.blocks, blocks_before + 1):
        # the smallest matrix has 16,384 entries: the standard error of its std is 0.6 %
        for weight in (block.attn.qkv.weight, block.ffn.fc1.weight): assert abs(weight.std() / .02 - 1) < .03
        for weight in (block.attn.proj.weight, block.ffn.fc2.weight):
            assert abs(weight.std() * (2 * l) ** .5 / .02 - 1) < .03


# noise
def test_eval_is_deterministic_train_is_not():
    encoder, (images, keep) = small(), images_and_keep()
    assert torch.equal(encoder(images, keep), encoder(images, keep))
    encoder.train()
    assert not torch.equal(encoder(images, keep), encoder(images, keep))
    torch.manual_seed(3)
    a = encoder(images, keep)
    torch.manual_seed(3)
    assert torch.equal(a, encoder(images, keep))


def test_without_rates_train_is_eval():
    encoder, (images, keep) = small(drop_rate=0., attn_drop_rate=0., drop_path_rate=0.), images_and_keep()
    reference = encoder(images, keep)
    assert torch.equal(encoder.train()(images, keep), reference)


def test_drop_path_grows_linearly():
    encoder = small(depth=5, drop_path_rate=.1)
    assert [b.drop_path.drop_prob for b in encoder.transformer.blocks] == pytest.approx([0, .025, .05, .075, .1])


# the mask
@pytest.mark.parametrize('tokenizer', ['sparse', 'patch'])
@pytest.mark.parametrize('reg_tokens', [0, 3])
def test_hidden_pixels_change_nothing(tokenizer, reg_tokens):
    encoder, (images, keep) = small(tokenizer=tokenizer, reg_tokens=reg_tokens), images_and_keep()
    visible = F.interpolate(keep.view(2, 1, 4, 4).float(), scale_factor=16).bool()
    noisy = torch.where(visible, images, 100 * torch.randn_like(images))
    with torch.no_grad():
        assert (encoder(noisy, keep) - encoder(images, keep)).abs().max().item() == 0.0
        assert (encoder(noisy) - encoder(images)).abs().max() > 0  # the test can fail


def test_hidden_pixels_get_no_gradient():
    encoder, (images, keep) = small(), images_and_keep()
    images.requires_grad_()
    encoder(images, keep).square().sum().backward()
    visible = F.interpolate(keep.view(2, 1, 4, 4).float(), scale_factor=16).bool().expand_as(images)
    assert images.grad[~visible].abs().max() == 0 and images.grad[visible].abs().max() > 0


def test_hidden_positions_carry_the_mask_token():
    encoder, (images, keep) = small(), images_and_keep()
    seen = {}
    encoder.transformer.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    encoder(images, keep)
    assert (seen['tokens'][~keep] == encoder.mask_token[0, 0]).all()
    assert torch.equal(seen['tokens'][keep], encoder.tokenizer(images, keep)[keep])


def test_images_of_a_batch_do_not_mix():
    encoder, (images, keep) = small(), images_and_keep(batch=3)
    together = encoder(images, keep)
    for i in range(3):
        assert gap(encoder(images[i:i + 1], keep[i:i + 1])[0], together[i]) <= 1e-5


# attention
def test_sdpa_is_weights_times_values():
    torch.manual_seed(0)
    attn, x = Attention(64, 4).eval(), torch.randn(2, 10, 64)
    by_hand = (attn.weights(x) @ attn.split(x)[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn(x), attn.proj(by_hand), atol=1e-6, rtol=0)


def test_attention_equals_torchs_own():
    torch.manual_seed(0)
    attn, x = Attention(32, 4), torch.randn(2, 9, 32)
    theirs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    theirs.load_state_dict({'in_proj_weight': attn.qkv.weight, 'out_proj.weight': attn.proj.weight})
    torch.testing.assert_close(attn(x), theirs(x, x, x)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize('reg_tokens', [0, 3])
def test_attention_rows_sum_to_one(reg_tokens):
    encoder, (images, _) = small(reg_tokens=reg_tokens), images_and_keep()
    weights = encoder.attention(images)
    assert weights.shape == (2, 4, 16 + reg_tokens, 16 + reg_tokens) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-6, rtol=0)


def test_attention_is_what_the_forward_pass_uses():
    encoder, (images, _) = small(reg_tokens=1), images_and_keep()
    inputs = []
    for block in encoder.transformer.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append(module.weights(args[0])))
    encoder(images)
    used = list(inputs)
    for i in (0, 1, -1, -2): assert torch.equal(encoder.attention(images, i), used[i])


# one block's tokens, and the reading that is measured
def bytes_of(batch=2, side=64, seed=2):
    return torch.randint(256, (batch, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize('reg_tokens', [0, 2])
@pytest.mark.parametrize('block', [0, 1, 2, -1, -2, -3])
def test_tokens_after_a_block_are_those_of_an_encoder_that_ends_there(block, reg_tokens):
    encoder, (images, keep) = small(depth=3, reg_tokens=reg_tokens), images_and_keep()
    short = copy.deepcopy(encoder)
    short.transformer.blocks = short.transformer.blocks[:block % 3 + 1]
    for mask in (None, keep): assert torch.equal(encoder(images, mask, block=block), short(images, mask))
    assert torch.equal(encoder.features(bytes_of(), block), short.features(bytes_of()))
    whole = block in (2, -1)
    assert torch.equal(encoder(images, keep, block), encoder(images, keep)) == whole


@pytest.mark.parametrize('block', [2, -3])
def test_an_unknown_block_is_refused(block):
    encoder, (images, keep) = small(), images_and_keep()
    calls = (lambda: encoder(images, keep, block), lambda: encoder.attention(images, block),
             lambda: encoder.features(bytes_of(), block))
    for call in calls:
        with pytest.raises(ValueError, match=f'block={block}: there are 2 blocks: choose -2 to 1'): call()


@pytest.mark.parametrize('side', [32, 64, 112])
def test_features_are_what_the_probes_measure(side):
    encoder, images = small(drop_rate=.5), bytes_of(67, side)  # more than one batch
    data = ImageSet(images, torch.zeros(67).long(), torch.ones(67), ['flower'], 'toy', has_test=False, skipped=[])
    found = encoder.features(images)
    assert found.shape == (67, 64) and found.dtype == torch.float32 and found.device.type == 'cpu'
    torch.testing.assert_close(found, encode(copy.deepcopy(encoder), data).means, atol=1e-5, rtol=1e-5)


def test_features_by_hand():
    encoder, images = small(), bytes_of()
    encoder.transformer.blocks[-1].ffn.fc2.weight.data *= 500  # at random, tokens are nearly normalized already
    tokens = encoder(eval_view(images))
    by_hand = ((tokens - tokens.mean(-1, True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()).mean(1)
    torch.testing.assert_close(encoder.features(images), by_hand, atol=1e-5, rtol=1e-5)
    assert (tokens.mean(1) - by_hand).abs().max() > .1  # the plain mean is another reading


def test_features_leave_no_trace():
    encoder = small(drop_rate=.5).train()
    encoder.tokenizer.eval()  # a part that was frozen by hand stays so
    modes, before = [m.training for m in encoder.modules()], torch.get_rng_state()
    first = encoder.features(bytes_of())
    assert torch.equal(first, encoder.features(bytes_of())) and not first.requires_grad and not first.is_inference()
    assert modes == [m.training for m in encoder.modules()] and torch.equal(before, torch.get_rng_state())
    def broken(*args): raise RuntimeError
    encoder.transformer.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError): encoder.features(bytes_of())
    assert modes == [m.training for m in encoder.modules()]


def test_features_of_no_image():
    assert small().features(bytes_of(0)).shape == (0, 64)


@pytest.mark.parametrize('change, named', [
    (lambda x: x.float(), 'float32'), (lambda x: x[0], r'\(3, 64, 64\)'), (lambda x: x[:, :1], r'\(2, 1, 64, 64\)'),
    (lambda x: x[..., :48], r'\(2, 3, 64, 48\)'), (lambda x: x[..., :60, :60], 'multiple of 16.*60, 60')])
def test_features_refuse_what_is_no_batch_of_images(change, named):
    with pytest.raises(ValueError, match=named) as error: small().features(change(bytes_of()))
    assert 'uint8 tensor of shape (N, 3, S, S)' in str(error.value) and '\n' not in str(error.value)


# positions and image sizes
def test_blocks_alone_do_not_know_positions():
    torch.manual_seed(0)
    block, x, perm = Block(64, 4).eval(), torch.randn(1, 16, 64), torch.randperm(16)
    assert gap(block(x[:, perm]), block(x)[:, perm]) <= 1e-5
    pos = sincos_positions((4, 4), 64)
    assert (block(x[:, perm] + pos) - block(x + pos)[:, perm]).abs().max() > .1


def test_positions_depend_on_rows_first():
    pos = sincos_positions((3, 5), 16).view(3, 5, 16)
    assert (pos[:, :1, :8] == pos[..., :8]).all() and (pos[:1, :, 8:] == pos[..., 8:]).all()
    assert pos.view(15, 16).unique(dim=0).shape[0] == 15


def test_same_size_keeps_positions_other_sizes_interpolate():
    net = Transformer((4, 6), 16, 1, 2)
    assert torch.equal(net.positions((4, 6)), sincos_positions((4, 6), 16))
    assert net.positions((8, 12)).shape == (96, 16)
    # bicubic weights sum to 1: what is constant along an axis stays so (here: the row's channels along the columns)
    fine = net.positions((8, 12)).view(8, 12, 16)
    torch.testing.assert_close(fine[:, :1, :8].expand(-1, 12, -1), fine[..., :8], atol=1e-5, rtol=0)


@pytest.mark.parametrize('size', [(128, 128), (32, 32), (64, 96), (48, 16)])
def test_other_image_sizes(size):
    encoder = small(reg_tokens=2)
    images, keep = images_and_keep(size=size, visible=1)
    for out in (encoder(images), encoder(images, keep)):
        assert out.shape == (2, size[0] * size[1] // 256, 64) and out.isfinite().all()


def test_non_square_training_grid():
    encoder = small(img_size=(96, 160))
    assert encoder.grid == (6, 10) and encoder(torch.randn(1, 3, 96, 160)).shape == (1, 60, 64)
    assert encoder(torch.randn(1, 3, 160, 96)).shape == (1, 60, 64)  # transposed: the same N, another grid
    assert not torch.equal(encoder.transformer.positions((10, 6)), encoder.transformer.positions((6, 10)))


# wrong use
@pytest.mark.parametrize('kwargs, message', [
    (dict(img_size=100), 'img_size=100 is no multiple of patch_size=16: choose e.g. 96'),
    (dict(img_size=8), 'choose e.g. 16'),
    (dict(tokenizer='resnet'), "tokenizer='resnet'"),
    (dict(patch_size=8), 'patch_size=8'),
    (dict(ffn='relu'), "ffn='relu'"),
    (dict(num_heads=5), 'num_heads=5'),
    (dict(embed_dim=66, num_heads=2), 'multiple of 4')])
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message.replace('.', r'\.')): small(**kwargs)


def test_wrong_images_and_masks():
    encoder, (images, keep) = small(), images_and_keep()
    with pytest.raises(ValueError, match='60x64'): encoder(images[:, :, :60], keep)
    with pytest.raises(ValueError, match='keep must be bool'): encoder(images, keep.float())
    with pytest.raises(ValueError, match='keep must be bool'): encoder(images, keep[:, :9])


def test_patch_grid_and_hidden_width():
    assert patch_grid((96, 160), 16) == (6, 10) and patch_grid(224, 16) == (14, 14)
    widths = {dim: feed_forward('swiglu', dim, 4.).fc2.in_features for dim in (32, 192, 384, 768)}
    assert widths == {32: 128, 192: 512, 384: 1024, 768: 2048}
    assert feed_forward('mlp', 32, 2.).fc2.in_features == 64


# saving and loading
@pytest.mark.parametrize('kwargs', [{}, dict(ffn='mlp', mlp_ratio=2., reg_tokens=3), dict(img_size=(32, 64)),
                                    dict(tokenizer='patch', patch_size=8, in_chans=1)])
def test_round_trip_is_bit_equal(tmp_path, kwargs):
    encoder = small(**kwargs)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert not again.training and again.grid == encoder.grid
    assert json.loads((tmp_path / 'config.json').read_text()).keys() >= SMALL.keys()
    images = torch.randn(2, kwargs.get('in_chans', 3), 32, 64)
    assert torch.equal(again(images), encoder(images))
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values()))


def test_a_deep_copy_saves_its_own_config(tmp_path):
    copy.deepcopy(small(depth=1)).save_pretrained(tmp_path)  # the target encoder is such a copy
    assert Encoder.from_pretrained(tmp_path).depth == 1


def test_arguments_can_replace_the_config(tmp_path):
    encoder = small()
    encoder.save_pretrained(tmp_path)
    larger = Encoder.from_pretrained(tmp_path, img_size=128, drop_rate=0.)
    assert larger.grid == (8, 8) and larger.transformer.drop.p == 0
    assert torch.equal(larger.mask_token, encoder.mask_token)


def edit_config(change):
    def damage(folder):
        config = json.loads((folder / 'config.json').read_text())
        change(config)
        (folder / 'config.json').write_text(json.dumps(config))
    return damage


def edit_weights(change):
    def damage(folder):
        weights = load_file(folder / 'model.safetensors')
        change(weights)
        save_file(weights, folder / 'model.safetensors')
    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize('damage, named', [
    (lambda folder: (folder / 'config.json').unlink(), 'config.json is missing'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors'),
    (cut('config.json', 0), 'config.json'),
    (cut('config.json', 40), 'config.json'),
    (cut('model.safetensors', 0), 'header'),
    (cut('model.safetensors', 50_000), 'incomplete'),
    (edit_config(lambda c: c.pop('num_heads')), 'num_heads'),
    (edit_config(lambda c: c.update(dept=3)), 'dept'),
    (edit_config(lambda c: c.update(embed_dim=96)), 'size mismatch'),
    (edit_config(lambda c: c.update(depth=3)), 'Missing key'),
    (edit_config(lambda c: c.update(depth=1)), 'Unexpected key'),
    (edit_config(lambda c: c.update(ffn='relu')), "ffn='relu'"),
    (edit_weights(lambda w: w.pop('mask_token')), 'mask_token'),
    (edit_weights(lambda w: w.update(extra=torch.zeros(1))), 'extra')])
def test_damaged_folders_raise_one_line(tmp_path, damage, named):
    small().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as error: Encoder.from_pretrained(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and named in message and '\n' not in message


def asked(monkeypatch, answer):
    "Replace the Hub: the list of repositories that it was asked for, and what it answers."
    names = []
    def hub(repo, **kwargs):
        names.append((repo, kwargs['revision']))
        if isinstance(answer, Exception): raise answer
        return str(answer)
    monkeypatch.setattr(encoder_module, 'snapshot_download', hub)
    return names


@pytest.mark.parametrize('source', ['runs/contxt', './nowhere', '../nowhere', '~/nowhere', '/nowhere/at/all', 'a/b/c',
                                    'scott-flowers', 'runs/target/', Path('nowhere/here')])
def test_what_can_only_be_a_path_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, source):
    names = asked(monkeypatch, RuntimeError('the Hub was asked'))
    (tmp_path / 'runs').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error: Encoder.from_pretrained(source)
    message = str(error.value)
    assert not names and '\n' not in message and str(source) in message and 'no such folder' in message


@pytest.mark.parametrize('source', ['~nobody-here/enc', 'a\0b', 'x' * 300, 'runs/' + 'x' * 300])
def test_odd_paths_are_one_line_as_well(source, tmp_path, monkeypatch):
    names = asked(monkeypatch, RuntimeError('the Hub was asked'))
    (tmp_path / 'runs').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='no such folder'): Encoder.from_pretrained(source)
    assert not names


def test_the_home_folder_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    small().save_pretrained(tmp_path / 'enc')
    assert Encoder.from_pretrained('~/enc').depth == Encoder.from_pretrained(Path('~/enc')).depth == 2


def test_a_run_folder_names_its_encoders(tmp_path):
    for part in ('context', 'target'): small().save_pretrained(tmp_path / part)
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='is a run folder') as error: Encoder.from_pretrained(tmp_path)
    assert all(str(tmp_path / part) in str(error.value) for part in ('context', 'target'))
    small(depth=1).save_pretrained(tmp_path)                  # an encoder that has such folders in it
    assert Encoder.from_pretrained(tmp_path).depth == 1


def test_a_file_names_its_folder(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='is a file: name the folder'):
        Encoder.from_pretrained(tmp_path / 'model.safetensors')


@pytest.mark.parametrize('device', ['tpu', 'xpu', 'cuda:99', 'cuda:one'])
def test_a_device_that_is_not_there(tmp_path, device):
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"map_location='{device}'.*cpu is always there") as error:
        Encoder.from_pretrained(tmp_path, map_location=device)
    assert '\n' not in str(error.value)


def test_owner_and_name_are_looked_for_on_the_hub(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path / 'cache')
    names = asked(monkeypatch, tmp_path / 'cache')
    assert Encoder.from_pretrained('lab/flowers', revision='v1').depth == 2
    monkeypatch.setitem(encoder_module.PUBLISHED, 'flowers', 'lab/other')
    assert Encoder.from_pretrained('flowers').depth == 2
    assert names == [('lab/flowers', 'v1'), ('lab/other', None)]


def test_a_repository_that_cannot_be_had_is_one_line_without_the_hubs_traceback(monkeypatch):
    asked(monkeypatch, FileNotFoundError('no connection\n' + 300 * 'x '))
    with pytest.raises(ValueError) as error: Encoder.from_pretrained('lab/flwers')
    message = str(error.value)
    assert all(word in message for word in ('lab/flwers', 'is no folder here', 'Hub', 'no connection'))
    assert '\n' not in message and len(message) < 500
    assert error.value.__suppress_context__ and error.value.__cause__ is None


def test_loading_draws_no_random_number(tmp_path):
    small().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    Encoder.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


# mixed precision and the compiler
@pytest.mark.parametrize('reg_tokens', [0, 2])
def test_bf16_autocast_forward_and_backward(reg_tokens):
    encoder, (images, keep) = small(reg_tokens=reg_tokens), images_and_keep()
    reference = encoder(images, keep)
    encoder.train()
    with torch.autocast('cpu', torch.bfloat16): loss = encoder(images, keep).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in encoder.parameters())
    encoder.eval()
    with torch.autocast('cpu', torch.bfloat16): rounded = encoder(images, keep)
    # bf16 keeps 8 bits: each rounding is at most 1/256 of a value; 5 % leaves room for a dozen of them
    assert (rounded.float() - reference).norm() < .05 * reference.norm()


def test_no_graph_breaks():
    encoder, (images, keep) = small(), images_and_keep()
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(encoder)(images, keep)
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0, explanation.break_reasons
