"""Nothing is unpickled, no code is loaded, no file names another, and every input has a size."""

import ast
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

import meanflow_ros
from meanflow_ros.core import policy as policy_module
from meanflow_ros.core.policy import CheckpointError, Policy
from meanflow_ros.core.schema import MAX_ITEMS, read_yaml
from meanflow_ros.core.urdf import limits_from_urdf

PACKAGE = Path(meanflow_ros.__file__).parent
SOURCES = sorted([*PACKAGE.rglob('*.py'), *(PACKAGE.parent / 'launch').glob('*.py')])
FORBIDDEN_MODULES = {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve',
                     'jsonpickle', 'torch.hub', 'torch.package'}
FORBIDDEN_CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'torch.load',
                   'torch.save', 'torch.jit.load', 'torch.hub.load', 'yaml.load', 'yaml.load_all',
                   'yaml.full_load', 'yaml.unsafe_load', 'pickle.loads', 'pickle.load',
                   'subprocess.getoutput', 'subprocess.getstatusoutput', 'runpy.run_path',
                   'exec_module', 'np.fromfile'}
# The packages of message types that stand in a table of the same file.
KNOWN = {'meanflow_ros/sim/sim_node.py': ['import_module of a name that is no constant']}
# argument -> the only value that it may have
FORBIDDEN_ARGUMENTS = {'shell': False, 'trust_remote_code': False, 'allow_pickle': False,
                       'weights_only': True}


def dotted(node: ast.expr) -> str:
    """Return the name of what is called, `a.b.c`, as far as it is made of names."""
    if isinstance(node, ast.Attribute):
        return f'{dotted(node.value)}.{node.attr}'
    return node.id if isinstance(node, ast.Name) else ''


def dangers(source: str) -> list[str]:
    """Return what a source does that could run somebody else's code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, 'module', None) or ''
            names = [alias.name for alias in node.names]
            found += [name for name in [module, *names, *(f'{module}.{name}' for name in names)]
                      if name in FORBIDDEN_MODULES | FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS or name.endswith('.exec_module'):
                found.append(name)
            if name.endswith('import_module') and not isinstance(node.args[0], ast.Constant):
                found.append('import_module of a name that is no constant')
            found += [f'{keyword.arg}={ast.unparse(keyword.value)}' for keyword in node.keywords
                      if keyword.arg in FORBIDDEN_ARGUMENTS
                      and not (isinstance(keyword.value, ast.Constant) and keyword.value.value
                               is FORBIDDEN_ARGUMENTS[keyword.arg])]
    return found


def test_nothing_in_the_package_could_run_somebody_elses_code():
    assert len(SOURCES) > 60
    found = {str(path.relative_to(PACKAGE.parent)): dangers(path.read_text())
             for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == KNOWN


@pytest.mark.parametrize('source', [
    'import pickle', 'from torch import load', 'from pickle import loads as l', 'eval(text)',
    'torch.load(path)', 'yaml.load(text)', 'np.load(path, allow_pickle=True)',
    'np.load(path, allow_pickle=choice)', 'subprocess.run(text, shell=True)',
    'AutoModel.from_pretrained(name, trust_remote_code=True)', 'os.system(text)',
    'importlib.import_module(name)', 'spec.loader.exec_module(module)'])
def test_the_scan_finds_each_of_them(source):
    assert dangers(source)


# Checkpoints


def changed_checkpoint(source, target, change):
    """Copy a checkpoint with its policy.yaml changed."""
    target.mkdir()
    for name in ('model.safetensors', 'tokenizer.json'):
        (target / name).write_bytes((source / name).read_bytes())
    document = yaml.safe_load((source / 'policy.yaml').read_text())
    change(document)
    (target / 'policy.yaml').write_text(yaml.safe_dump(document))
    return target


@pytest.mark.parametrize('name', ['../../secret', '/etc/passwd', 'a/b', '..', 'a b', 'wrist.', '',
                                  '1st', '~', 'x' * 65, 'caf\u00e9', 'a\0b', 'a\nb', '{x}'])
def test_a_camera_in_a_checkpoint_cannot_name_a_file_or_another_topic(
        micro_checkpoint, tmp_path, name):
    path = changed_checkpoint(micro_checkpoint, tmp_path / 'policy', lambda document:
                              document['robot']['cameras'][0].update(name=name))
    with pytest.raises(CheckpointError, match='name|non-empty'):
        Policy.load(path)


@pytest.mark.parametrize('field, value', [
    ('model', '../other/model.safetensors'), ('weights', '/etc/passwd'),
    ('tokenizer', 'https://example.org/tokenizer.json'), ('auto_map', {'AutoModel': 'code.Net'})])
def test_a_checkpoint_has_no_field_for_files_or_code(micro_checkpoint, tmp_path, field, value):
    for place in ([], ['robot'], ['encoder'], ['dit']):
        def change(document, place=place):
            for key in place:
                document = document[key]
            document[field] = value

        path = changed_checkpoint(micro_checkpoint, tmp_path / f'policy{len(place)}{place}',
                                  change)
        with pytest.raises(CheckpointError, match=f"unknown field '{field}'"):
            Policy.load(path)


def test_no_file_of_a_checkpoint_is_a_link_that_leads_away_from_the_others(
        micro_checkpoint, tmp_path):
    path = changed_checkpoint(micro_checkpoint, tmp_path / 'policy', lambda document: None)
    linked = tmp_path / 'linked'   # as by colcon build --symlink-install
    linked.mkdir()
    for file in path.iterdir():
        (linked / file.name).symlink_to(file)
    Policy.load(linked)
    (path / 'tokenizer.json').rename(tmp_path / 'elsewhere.json')
    (path / 'tokenizer.json').symlink_to(tmp_path / 'elsewhere.json')
    with pytest.raises(CheckpointError, match='leads away'):
        Policy.load(path)


def test_tags_of_yaml_make_no_objects(micro_checkpoint, tmp_path):
    path = changed_checkpoint(micro_checkpoint, tmp_path / 'policy', lambda document: None)
    with open(path / 'policy.yaml', 'a') as file:
        file.write('training: !!python/object/apply:os.system [touch /tmp/owned]\n')
    with pytest.raises(CheckpointError, match='python/object'):
        Policy.load(path)


def test_weights_that_are_a_pickle_are_no_weights(micro_checkpoint, tmp_path):
    import torch
    path = changed_checkpoint(micro_checkpoint, tmp_path / 'policy', lambda document: None)
    torch.save({'a': torch.zeros(2)}, path / 'model.safetensors')
    with pytest.raises(CheckpointError, match='cannot be read'):
        Policy.load(path)


@pytest.mark.parametrize('name, limit', [('policy.yaml', 'MAX_CONFIG_BYTES'),
                                         ('tokenizer.json', 'MAX_TOKENIZER_BYTES')])
def test_large_files_of_a_checkpoint_are_not_read(micro_checkpoint, tmp_path, name, limit):
    path = changed_checkpoint(micro_checkpoint, tmp_path / 'policy', lambda document: None)
    with open(path / name, 'ab') as file:
        file.truncate(getattr(policy_module, limit) + 1)
    with pytest.raises(CheckpointError, match='larger than'):
        Policy.load(path)


# Files and texts that grow


def billion_laughs() -> str:
    lines = ['a0: &a0 [lol, lol]']
    lines += [f'a{n}: &a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 40)]
    return '\n'.join(lines)


@pytest.mark.parametrize('text', [billion_laughs(), 'a: &a [*a]', f'a: {[0] * MAX_ITEMS}'])
def test_yaml_that_grows_when_it_is_followed_is_refused(tmp_path, text):
    path = tmp_path / 'file.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match=f'more than {MAX_ITEMS} values'):
        read_yaml(path, 2**22)


def test_a_small_yaml_may_have_aliases(tmp_path):
    path = tmp_path / 'file.yaml'
    path.write_text('limit: &l {a: 1.5}\nother: *l\n')
    assert read_yaml(path, 100) == {'limit': {'a': 1.5}, 'other': {'a': 1.5}}
    with pytest.raises(ValueError, match='larger than 10 bytes'):
        read_yaml(path, 10)


@pytest.mark.parametrize('text', [
    '<!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><robot name="&b;"/>',
    '<!DOCTYPE r SYSTEM "file:///etc/passwd"><robot/>',
    '<?xml version="1.0"?><!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><robot>&x;</robot>'
])
def test_a_robot_description_has_no_entities(text):
    with pytest.raises(ValueError, match='document type or entities'):
        limits_from_urdf(text, ['joint'])


def test_weights_of_another_size_than_the_network_are_refused(micro_checkpoint, tmp_path):
    path = changed_checkpoint(micro_checkpoint, tmp_path / 'policy', lambda document: None)
    data = (path / 'model.safetensors').read_bytes()
    size = struct.unpack('<Q', data[:8])[0]
    (path / 'model.safetensors').write_bytes(struct.pack('<Q', 2**62) + data[8:])
    with pytest.raises(CheckpointError, match='cannot be read'):
        Policy.load(path)
    rest = np.frombuffer(data[8 + size:], np.uint8)
    (path / 'model.safetensors').write_bytes(data[:8 + size] + rest[:-4].tobytes())
    with pytest.raises(CheckpointError, match='cannot be read'):
        Policy.load(path)
