"""
The Well's HDF5 format: one file as named channels.
"""
import h5py
import numpy as np

from remote import opened, path_of
from systems import spatial_axes


def read_file(path):
    """(h5py.File, {channel name: (dataset, component index)}, {scalar: values}, (trajectories, frames, nx, ny)).

    A scalar has one value for each trajectory. Channels in the file's order: t0, t1, t2 fields, alphabetical inside
    a group, components last index fastest, named like The Well's metadata (velocity_x, D_xy). Raises ValueError
    naming the file.
    """
    try:
        f = h5py.File(opened(path), 'r')
    except OSError as e:
        with path_of(path).open('rb') as raw:
            page = raw.read(512).lstrip()[:1] == b'<'
        raise ValueError(f'{path} is not a readable HDF5 file (' + ('but a web page: the download failed' if page else
                         str(e)) + '): download or simulate it again') from None
    for group in 'dimensions', 'scalars', 't0_fields', 't1_fields', 't2_fields':
        if group not in f:
            raise ValueError(f"{path} has no group '{group}': it is not in The Well's format")
    if 'spatial_dims' not in f['dimensions'].attrs:
        raise ValueError(f"{path}: group 'dimensions' has no attribute 'spatial_dims': it is not in The Well's format")
    axes = spatial_axes(f)
    if len(axes) != 2:
        raise ValueError(f'{path} has {len(axes)} spatial axes, {", ".join(axes)}: only fields in two will do')
    channels = {}
    for order in range(3):
        for name in sorted(f[f't{order}_fields']):
            d = f[f't{order}_fields'][name]
            for index in np.ndindex(*d.shape[4:]):
                channels['_'.join([name, ''.join(axes[i] for i in index)]) if index else name] = (d, index)
    if not channels:
        raise ValueError(f'{path} has no fields')
    shape = next(iter(channels.values()))[0].shape[:4]
    for name, (d, _) in channels.items():
        if d.shape[:4] != shape or len(shape) != 4:
            raise ValueError(f'{path}: field {name} has shape {d.shape}, expected {shape} (trajectories, frames, x, y)')
    scalars = {}
    for name, d in f['scalars'].items():
        values = np.asarray(d, float)
        own = values.ndim and len(values) == shape[0] and d.attrs.get('sample_varying', False)
        scalars[name] = [float(v.ravel()[0]) for v in (values if own else [values] * shape[0])]
    return f, channels, scalars, shape


def look_into(path):
    """(names of the channels, (nx, ny)) of a file."""
    f, channels, _, shape = read_file(path)
    f.close()
    return list(channels), shape[2:]
