"""Our modules against numbers recorded from the authors' released code. The files are found by $SCOTT_PARITY."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import gap
from safetensors.torch import load_file

from scott.encoder import Encoder
from scott.interop import load_official
from scott.jepa import MIMJEPA
from scott.predictor import Predictor
from scott.probe.heads import CrossAttentive, MultiHeadAttentive, SimpleAttentive
from scott.schedule import Values
from scott.train.machine import Place
from scott.train.trainer import Trainer

FORWARD, STEPS = 1e-5, 1e-4  # bounds of `gap`: forward passes and gradients; weights after three steps
OUTPUTS = ('tokenizer_full tokenizer_masked encoder_full encoder_masked vit_full vit_masked attention_last '
           'predictor targets probe_simple probe_multihead probe_cross').split()


class Recorded:
    "One file of recorded numbers, and our modules with its weights in them."

    def __init__(self, folder, name):
        self.tensors = load_file(folder / f'{name}.safetensors')
        self.config = json.loads((folder / f'{name}.json').read_text())
        c = self.config
        self.args = dict(embed_dim=c['embed_dim'], num_heads=c['num_heads'], ffn=c['ffn'], mlp_ratio=c['mlp_ratio'],
                         reg_tokens=c['num_register_tokens'], drop_rate=0., attn_drop_rate=0., drop_path_rate=0.)
        self.context, self.target = self.tensors['in.context'], self.tensors['in.target']
        self.keep = self.tensors['in.keep'].bool()

    def part(self, prefix):
        return {k[len(prefix):]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def encoder(self, tokenizer='sparse'):
        return Encoder(tokenizer, img_size=self.config['img_size'], depth=self.config['depth'], **self.args)

    def predictor(self):
        c = self.config
        return Predictor(self.keep.shape[1], depth=c['predictor_depth'], encoder_depth=c['depth'], **self.args)

    def jepa(self):
        return MIMJEPA(load_official(self.encoder(), self.part('encoder.')),
                       load_official(self.predictor(), self.part('predictor.')))

    def heads(self):
        size = self.config['embed_dim'], self.config['num_classes']
        for name, cls in dict(simple=SimpleAttentive, multihead=MultiHeadAttentive, cross=CrossAttentive).items():
            yield f'probe_{name}', load_official(cls(*size), self.part(f'probe_{name}.')).eval()


@pytest.fixture(scope='module', params=['tiny_swiglu', 'tiny_mlp_registers'])
def recorded(request):
    where = os.environ.get('SCOTT_PARITY')
    if not where:
        pytest.skip('SCOTT_PARITY is not set: the numbers recorded from the released code are not in this repository')
    file = Path(where) / f'{request.param}.safetensors'
    assert file.is_file(), f'SCOTT_PARITY={where} has no {file.name}'
    return Recorded(Path(where), request.param)


@torch.no_grad()
def outputs(r):
    "Every recorded forward pass, by our modules."
    encoder, vit = r.jepa().context.eval(), load_official(r.encoder('patch'), r.part('vit.')).eval()
    x, keep = r.context, r.keep
    full, masked = encoder(x), encoder(x, keep)
    tokens = F.layer_norm(r.tensors['out.encoder_full'], full.shape[-1:])
    return dict(tokenizer_full=encoder.tokenizer(x), tokenizer_masked=encoder.tokenizer(x, keep),
                encoder_full=full, encoder_masked=masked, vit_full=vit(x), vit_masked=vit(x, keep),
                attention_last=encoder.attention(x), predictor=r.jepa().predictor.eval()(masked),
                targets=r.jepa().targets(r.target), **{name: head(tokens) for name, head in r.heads()})


@pytest.fixture(scope='module')
def ours(recorded):
    return outputs(recorded)


@pytest.mark.parametrize('name', OUTPUTS)
def test_forward(recorded, ours, name):
    assert gap(ours[name], recorded.tensors[f'out.{name}']) <= FORWARD


def three_steps(r, factor=1.):
    "The recorded steps, made by the trainer of the package; returns model and losses."
    c = r.config
    feed = SimpleNamespace(batches=lambda step: [(r.context, r.target, r.keep)])
    values = lambda step: Values(factor * c['lr'][step - 1], c['wd'][step - 1], c['ema'][step - 1])
    trainer = Trainer(r.jepa().train(), feed, SimpleNamespace(at=values), Place(torch.device('cpu'), None))
    losses = []
    for _ in c['losses']:
        trainer.tally.reset()
        trainer.train_step()
        losses.append(trainer.tally.read().loss)
    return trainer.model, losses


def with_fixed(r, prefix, owner):
    "A recorded dict of gradients, completed by what has no gradient, so that load_official takes it."
    return {**{k: v for k, v in r.part(f'{owner}.').items() if k.endswith('pos_embed')}, **r.part(prefix)}


def test_gradients(recorded):
    model = recorded.jepa().train()
    model(recorded.context, recorded.target, recorded.keep).backward()
    for owner, module, blank in (('encoder', model.context, recorded.encoder()),
                                 ('predictor', model.predictor, recorded.predictor())):
        official = dict(load_official(blank, with_fixed(recorded, f'grad.{owner}.', owner)).named_parameters())
        assert official.keys() == dict(module.named_parameters()).keys()
        for name, param in module.named_parameters():
            assert gap(param.grad, official[name]) <= FORWARD, f'{owner}.{name}'
    assert all(p.grad is None for p in model.target.parameters())


def test_three_training_steps(recorded):
    "The step that is taught is the step that is trained, and it is the released code's."
    model, losses = three_steps(recorded)
    assert len(losses) == 3 and losses == pytest.approx(recorded.config['losses'], abs=FORWARD)
    for owner, module, blank in (('encoder', model.context, recorded.encoder()),
                                 ('target', model.target, recorded.encoder()),
                                 ('predictor', model.predictor, recorded.predictor())):
        official = load_official(blank, recorded.part(f'after.{owner}.')).state_dict()
        for name, tensor in module.state_dict().items():
            assert gap(tensor, official[name]) <= STEPS, f'{owner}.{name}'


def test_a_wrong_step_is_noticed(recorded):
    "The tolerance on three steps is meaningful: one part in a hundred more learning rate does not pass."
    model, _ = three_steps(recorded, factor=1.01)
    official = load_official(recorded.encoder(), recorded.part('after.encoder.')).state_dict()
    assert max(gap(tensor, official[name]) for name, tensor in model.context.state_dict().items()) > STEPS


def test_every_recorded_tensor_is_used(recorded):
    parts = ['encoder', 'vit', 'predictor', 'probe_simple', 'probe_multihead', 'probe_cross',
             'grad.encoder', 'grad.predictor', 'after.encoder', 'after.predictor', 'after.target']
    rest = {k for k in recorded.tensors if not k.startswith(tuple(p + '.' for p in parts))}
    assert rest == {'in.context', 'in.target', 'in.keep', *(f'out.{name}' for name in OUTPUTS)}


def changed(state, **changes):
    "A copy of a state dict: name=None drops, name=tensor sets."
    state = {**state, **changes}
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize('owner', ['encoder', 'predictor'])
def test_nothing_is_loaded_partially(recorded, owner):
    state = recorded.part(f'{owner}.')
    weight = 'transformer.blocks.0.self_attn.qkv.weight'
    pos = state['transformer.pos_embed']
    for changes, error, named in (
            ({weight: None}, KeyError, 'transformer.blocks.0.attn.qkv.weight'),
            ({'transformer.pos_embed': None}, KeyError, 'pos_embed'),
            ({'transformer.surplus': pos}, KeyError, 'transformer.surplus'),
            ({'transformer.pos_embed': pos + .1}, ValueError, 'pos_embed'),
            ({'transformer.pos_embed': pos[1:]}, ValueError, 'pos_embed'),
            ({weight: state[weight][:, 1:]}, ValueError, 'attn.qkv.weight')):
        module = getattr(recorded, owner)()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(error, match=named): load_official(module, changed(state, **changes))
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_each_head_refuses_the_others_weights(recorded):
    heads = dict(recorded.heads())
    for name in heads:
        for other in heads.keys() - {name}:
            with pytest.raises(KeyError, match='missing .* left over'):
                load_official(heads[name], recorded.part(f'{other}.'))


def test_a_module_without_official_weights_is_refused():
    with pytest.raises(ValueError, match='Linear'): load_official(torch.nn.Linear(2, 2), {})
