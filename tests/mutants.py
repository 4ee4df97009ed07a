"""
Do the tests bite? Breaks one line at a time, in a copy, and runs the tests that should notice.

    python tests/mutants.py                # all: over half an hour on a core
    python tests/mutants.py betas noise    # those with one of these words in their line
    python tests/mutants.py --check        # runs none: is each line, and each test, still there? A second

A mutant that passes its tests has survived: exit code 1, and a test is missing. This is no part of the test
suite, but for --check (test_mutants.py).
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PROTOCOL, EVAL, DATA, CACHE, FILES = (
    f'tests/test_{name}.py' for name in ('protocol', 'eval', 'data', 'cache', 'files'))
PROBE, TRAIN, VICREG, STEP = (f'tests/test_{name}.py' for name in ('probe', 'train', 'vicreg', 'step'))
LOSSES, VJEPA, PIXELS, SPEED = (f'tests/test_{name}.py' for name in ('losses', 'vjepa', 'pixels', 'speed'))
STATISTICS, SIMULATE, FIGURES = (f'tests/test_{name}.py' for name in ('statistics', 'simulate', 'figures'))
DATASETS, MEMORY = 'tests/test_datasets.py', 'tests/test_memory.py'
BENCHMARK, CARRIES, REPORTING = (f'tests/test_{name}.py' for name in ('benchmark', 'generalize', 'reporting'))
BENCHMARK, CARRIES, GPU = (f'tests/test_{name}.py' for name in ('benchmark', 'generalize', 'gpu_benchmark'))
TABLES = 'tests/test_report.py --deselect tests/test_report.py::test_the_pages_say_what_results_says'
FLUIDS = 'tests/test_fluids.py'
REQUEUE, FAULTS = 'tests/test_requeue.py', 'tests/test_faults.py'
RANKS = 'test_all.py::test_two_ranks_equal_one_process'

MUTANTS = [                                              # file, what stands there once, what instead, tests
    # the loop
    ('train.py', 'betas=(0.9, 0.95)', 'betas=(0.9, 0.999)', PROTOCOL),
    ('train.py', 'weight_decay: float = of_optimizer(0.05', 'weight_decay: float = of_optimizer(0.0',
     PROTOCOL),
    ('train.py', 'warmup_epochs=0.5)}', 'warmup_epochs=0.0)}', TRAIN + ' -k settings'),
    ('train.py', '0.5 * (1 + math.cos', '0.5 * (0.8 + math.cos', TRAIN + ' -k schedule'),
    ('train.py', '[seed, 1, epoch]', '[seed, 1]', TRAIN + ' -k every_window'),
    ('train.py', "scale(losses['loss'] / accumulate).backward()", "scale(losses['loss']).backward()",
     TRAIN + ' -k accumulated'),
    ('train.py', 'model.network.after_step((step + 1) / steps)', 'pass',
     'tests/test_house.py -k model_is_one_file'),
    ('common.py', 'dist.broadcast_object_list(values, src=0)', 'pass', 'test_all.py -k disks_of_their_own'),
    ('train.py', 'if c.noise > 0:', 'if False:', PROTOCOL),
    ('train.py', 'x = x + c.noise * torch.randn', 'x = x + torch.randn', PROTOCOL),
    ('model.py', 'autocast(self.mean.device, self.lower)', 'autocast(self.mean.device)', PROTOCOL),
    ('train.py', "'paper': dict(dtype='float32'", "'paper': dict(dtype='bfloat16'", PROTOCOL),
    ('train.py', "group['fused'] = c.device == 'cuda'", 'pass', STEP + ' -k adamw'),
    ('model.py', 'block.forward = functools', 'kept = functools', STEP + ' -k again'),
    ('model.py', 'setattr(owner, name, functools', '(owner, name, functools', MEMORY + ' -k exact'),
    ('model.py', 'ROWS // y[0, ..., 0]', '2**60 // y[0, ..., 0]', MEMORY + ' -k exact'),
    ('train.py', 'scaler.get_scale() < 1', 'True', MEMORY + ' -k level'),
    ('train.py', "scaler.load_state_dict(state['scaler'])", 'pass', MEMORY + ' -k a_run_in_float16'),
    ('train.py', "torch.float32 if c.device == 'mps' else", '', MEMORY + ' -k no_float64'),
    ('common.py', 'including_emulation=False', '', MEMORY + ' -k emulated'),
    ('train.py', 'seeds(3)', 'seeds(2)', PROTOCOL),
    ('train.py', 'abs(s - t) >= FRAMES', 'abs(s - t) >= 1', PROTOCOL),
    ('train.py', 'standard_labels[windows[:, 0]]', 'standard_labels[windows[:, 1] % 3]', PROTOCOL),
    ('videomae.py', "parameter.ndim == 1 or name == 'mask_token'", 'parameter.ndim == 1', PROTOCOL),
    # a run that is taken away
    ('train.py', "stopped = terms.pop('stop')", "stopped = 0 * terms.pop('stop')", REQUEUE + ' -k after_its_step'),
    ('train.py', 'with alone_in(path.parent, wait=False) if RANK == 0 else', 'with contextlib.nullcontext() if True else',
     REQUEUE + ' -k share_a_folder'),
    ('train.py', 'torch.tensor(STOP.number,', 'torch.tensor(STOP.number * (RANK == 0),', REQUEUE + ' -k all_ranks'),
    ('train.py', 'time.monotonic() > due', 'False', REQUEUE + ' -k clock'),
    ('train.py', 'for n in (c.save_every, c.keep_every) if n', 'for n in (c.save_every,)', REQUEUE + ' -k are_kept'),
    ('train.py', 'if int(s) < step', 'if True', REQUEUE + ' -k log_goes_on'),
    ('train.py', "state.get('data_hash', data_hash) != data_hash", 'False', REQUEUE + ' -k other_data'),
    ('train.py', 'rtol=1e-3, atol=1e-6)', 'rtol=9.0)', REQUEUE + ' -k other_data'),
    ('data.py', 'h.update(read_blocks(path, 2**15))', 'read_blocks(path, 2**15)', REQUEUE + ' -k other_data'),
    ('data.py', 'self.channels, scalars]', 'self.channels]', REQUEUE + ' -k blocks_may_miss'),
    ('data.py', 'process.terminate()', 'pass', REQUEUE + ' -k processes_that_cache'),
    ('common.py', 'os._exit(128 + number)', 'pass', REQUEUE + ' -k second_signal'),
    ('common.py', "'TORCHELASTIC_RUN_ID' not in os.environ or", '', REQUEUE + ' -k second_signal'),
    ('common.py', 'raise KeyboardInterrupt', 'pass', REQUEUE + ' -k ctrl_c'),
    # a recipe, and what is measured on a GPU
    ('variants/vjepa.py', 'std_coeff=50.0', 'std_coeff=25.0', PROTOCOL + ' -k real_preset'),
    ('variants/vjepa.py', 'y = self.teacher(target)', 'y = self.teacher(context)', VJEPA + ' -k next_frames'),
    ('variants/vjepa.py', "if not inputs.paired:", 'if False:', VJEPA + ' -k bad_options'),
    ('benchmark/gpu.py', 'x = (x - mean) * (variance', 'x = x * (variance', GPU + ' -k moments'),
    ('benchmark/gpu.py', "'error' in measured.get(name, ['error'])", 'name not in measured', GPU + ' -k fails'),
    ('benchmark/gpu.py', "(folder / DEFAULT / 'simulated.json').unlink()", 'pass', GPU + ' -k the_data'),
    # what a step, a probe and an evaluation are given
    ('train.py', "group['lr'] = rate", 'pass', STEP + ' -k rate_of'),
    ('train.py', 'first = micro * c.micro_batch + RANK * B', 'first = RANK * B', STEP + ' -k share_a_batch'),
    ('train.py', '(c.seed, 10, step, micro)', '(c.seed, 10, step)', STEP + ' -k draws'),
    ('train.py', '(c.seed, 9, step, micro, RANK)', '(c.seed, 9, step, micro)', STEP + ' -k draws'),
    ('train.py', '(c.seed, 9, step, micro, RANK)', '(9, step, micro, RANK)', STEP + ' -k draws'),
    ('train.py', 'round(c.warmup_epochs * windows / c.batch)', 'round(c.warmup_epochs * windows)', STEP + ' -k rate_of'),
    ('jepa.py', 'numel(), generator=generator)', 'numel(), generator=torch.Generator().manual_seed(0))',
     'tests/test_jepa.py -k partners'),
    ('data.py', 'return (labels - labels.mean(0)) / labels.std(0)', 'return (labels - labels.mean(0)) / labels.std(0, ddof=1)',
     DATA + ' -k z_scored'),
    ('probe.py', 'seen.mean(0), seen.std(0)', "features['valid'].mean(0), features['valid'].std(0)",
     PROBE + ' -k z_scored'),
    ('eval.py', 'of_runs[name][w[:, 0]]', 'of_runs[name][0 * w[:, 0]]', EVAL + ' -k label_of'),
    # settings of the paper
    ('systems/shear_flow.py', 'lr=1e-4', 'lr=1e-3', PROTOCOL),
    ('systems/shear_flow.py', 'epochs=6.0', 'epochs=30.0', PROTOCOL),
    ('systems/shear_flow.py', 'stride=4', 'stride=1', PROTOCOL),
    ('systems/shear_flow.py', 'noise=1.0', 'noise=0.0', PROTOCOL),
    ('model.py', 'active_matter=0.079', 'active_matter=0.160', PROTOCOL),
    ('jepa.py', "loss_rows: str = option('local'", "loss_rows: str = option('global'", PROTOCOL),
    # the cache, and tokens that memory does not hold
    ('data.py', "np.load(self.paths[number], mmap_mode='r')", "np.load(self.paths[number], mmap_mode='c')", CACHE),
    ('data.py', "if not Path(f'{entry[2]}.npy').exists()", 'if entry', CACHE + ' -k killed'),
    ('data.py', 'if needed > free:', 'if False:', CACHE + ' -k hold'),
    ('data.py', '(run - self.first[number], *rest)', '(0, *rest)', DATA + ' -k files_values'),
    ('data.py', 'if resolution > max(kept)', 'if False', DATA + ' -k grow'),
    ('probe.py', 'max(1, PART // (4', 'max(9, PART // (4', PROBE),
    # what the benchmark counts
    ('benchmark/speed.py', 'return sum(wanted[:2]) * 2', 'return sum(wanted[:2]) * groups * 2',
     SPEED + ' -k convolutions'),
    ('benchmark/speed.py', '(3 * q[3] + 2 * v[3])', '(2 * q[3] + 2 * v[3])', SPEED + ' -k attention'),
    ('benchmark/speed.py', "group['lr'] = 0.0", 'pass', SPEED + ' -k training_step'),
    # losses
    ('vicreg.py', 'unbiased=False', 'unbiased=True', VICREG),
    ('vicreg.py', 'cov.diagonal().pow(2).sum()) / D', 'cov.diagonal().pow(2).sum())', VICREG),
    ('vicreg.py', 'grad.chunk(world)[rank] * world', 'grad.chunk(world)[rank]', RANKS),
    ('jepa.py', "loss_rows == 'global'", "loss_rows == 'any'", RANKS),
    ('variants/small.py', 'factor=8.0', 'factor=1.0', 'tests/test_jepa.py'),
    ('variants/small.py', 'torch.asinh(8 * means)', 'means', 'tests/test_jepa.py'),
    ('variants/small.py', 'products = a * b', 'products = a', 'tests/test_jepa.py'),
    ('jepa.py', 'p = z + p', 'p = p + 0', 'tests/test_jepa.py'),
    # the experiment: its data, its losses, what a table is made of
    ('systems/rayleigh_benard.py', '[seed, split, pair, run, 1]', '[seed, pair, run, 1]', SIMULATE + ' -k one_db'),
    ('systems/rayleigh_benard.py', '[seed, split, pair, run, 1]', '[seed, split, run, 1]', SIMULATE + ' -k one_db'),
    ('systems/rayleigh_benard.py', "uniform(*p.settings['db'])", 'choice([0.2, 0.4, 0.6, 0.8, 1.0])', SIMULATE + ' -k one_db'),
    ('objectives.py', 'if runs is not None:', 'if False:', LOSSES + ' -k infonce'),
    ('objectives.py', '& (partner[:, None] != partner)', '& (partner[:, None] < partner)', LOSSES + ' -k infonce'),
    ('train.py', "{'runs': runs.to(x.device)} if needs_runs else {}", '{}', LOSSES + ' -k told_the_runs'),
    ('train.py', 'torch.tensor(windows[:, 0])', 'torch.tensor(windows[:, 1])', PROTOCOL + ' -k views'),
    ('jepa.py', 'temperature=o.temperature, runs=runs)', 'temperature=o.temperature)', LOSSES + ' -k told_the_runs'),
    ('jepa.py', 'gather(runs)', 'runs', 'test_all.py -k two_ranks_equal'),
    ('train.py', '(c.seed, 10, step, micro)', '(c.seed % 4, 10, step, micro)', STEP + ' -k draws_differ'),
    ('probe.py', "'unlabelled' if 'unlabelled' in features else 'train'", "'train'", PROBE + ' -k all_training_tokens'),
    ('probe.py', "'unlabelled' if 'unlabelled' in features else 'train'", "'valid'", PROBE + ' -k all_training_tokens'),
    ('probe.py', '(splits[scored][0] - centre) @', 'splits[scored][0] @', PROBE + ' -k all_training_tokens'),
    ('benchmark/generalize.py', "'unlabelled': clean.get('unlabelled', clean['train'])}", "}", CARRIES + ' -k whole_runs'),
    ('benchmark/generalize.py', 'for order in orders:', 'for order in orders[:1]:', CARRIES + ' -k whole_runs'),
    ('eval.py', 'self.targets[name]', 'self.targets[name].flip(0)', EVAL + ' -k windows_label'),
    ('eval.py', 'encoder.head = torch.nn.Identity()', 'pass', EVAL + ' -k floors'),
    ('eval.py', 'torch.triu_indices(x.shape[1], x.shape[1])', 'torch.triu_indices(x.shape[1], x.shape[1], 1)',
     EVAL + ' -k products'),
    ('eval.py', "scored = clean | {'scored'", "scored = splits | {'scored'", EVAL + ' -k noise_is_on_all'),
    ('eval.py', "splits = run.embed(encode, title, noisy)", "splits = run.embed(encode, title)", EVAL + ' -k noise_is_on_all'),
    ('eval.py', 'noise = 0.0\n', 'pass\n', EVAL + ' -k noise_is_on_all'),
    ('eval.py', 'np.flatnonzero(drawn == seed)', 'np.arange(draws)[seed::len(by_seed)]', TABLES + ' -k interval'),
    ('eval.py', 'errors[runs].mean(1)', 'errors.mean()', TABLES + ' -k interval'),
    ('benchmark/report.py', 'one[seed] - other[seed] for seed in both', 'one[seed] - other[both[0]] for seed in both',
     TABLES + ' -k run_by_run'),
    ('model.py', "if state['config'].get('supervised') else unwrapped(model.network)", '', EVAL + ' -k tuned'),

    # the other losses, the teacher, masked latents, pixels
    ('objectives.py', 'weights[-1] /= 2', 'pass', LOSSES),
    ('objectives.py', '2 * reach / (', 'reach / (', LOSSES),
    ('objectives.py', '(sigreg(x, a) + sigreg(y, a)) / 2', 'sigreg(x, a)', LOSSES),
    ('objectives.py', 'similarity.T, partner', 'similarity, partner', LOSSES),
    ('jepa.py', 'slow.lerp_(fast, 1 - m)', 'slow.lerp_(fast, m)', LOSSES),
    ('jepa.py', '(end - start) * progress', '0.0 * progress', LOSSES),
    ('jepa.py', 'z_next = self.teacher(target)', 'z_next = self.encoder(target)', LOSSES),
    ('variants/vjepa.py', 'return F.layer_norm(y, y.shape[-1:])', 'return y', VJEPA),
    ('variants/vjepa.py', '+ mask).argsort', ').argsort', VJEPA),
    ('variants/vjepa.py', 'hidden.flatten(1).all(1)).any()', 'hidden.flatten(1).all(1)).all()', VJEPA),
    ('variants/vjepa.py', 'max(1, round((area / aspect)', 'max(1, round((area * aspect)', VJEPA),
    ('variants/vjepa.py', 'option((0.996, 1.0)', 'option((0.9, 1.0)', VJEPA),
    ('variants/vjepa.py', 'i[:, RANK * B:(RANK + 1) * B]', 'i[:, :B]', RANKS),
    ('variants/vjepa.py', 'in_full(gather(z))', 'in_full(z)', RANKS),
    ('variants/pixels.py', 'self.place[:, None, :, None]', 'self.place[:, :, None, None].transpose(1, 3)',
     PIXELS),
    ('variants/pixels.py', 'x = normalized_pixels(patchify(target', 'x = normalized_pixels(patchify(context',
     PIXELS),
    ('train.py', 'asdict(type(options)())', 'dict()', TRAIN + ' -k younger'),
    ('videomae.py', 'rank * batch:(rank + 1) * batch', ':batch', 'tests/test_videomae.py -k ranks'),
    ('eval.py', '[-steps:]', '[:steps]', EVAL + ' -k log_ends'),
    # pictures
    ('benchmark/figures.py', 'y, errors = i + ', 'y, errors = len(titles) + ', FIGURES),
    ('benchmark/figures.py', 'ddof=len(curve[s]) > 1', 'ddof=0', FIGURES),
    ('benchmark/figures.py', "of != ('linear' if title in SHARED else p)", "of != 'linear'", FIGURES),
    ('plot.py', 'if pair in files]', ']', FIGURES),
    # data
    ('data.py', 'np.log10(self.scalars[name]) if name in', 'self.scalars[name] if name in',
     DATA + ' tests/test_model.py'),
    ('data.py', "f'{split}-{resolution or", "f'train-{resolution or", CACHE),
    ('data.py', '{path.name} {stat.st_size} {stat.st_mtime_ns}', '{path.name}', CACHE),
    ('data.py', 'components.index(source)], sign, out', 'components.index(source)], 1, out', DATA),
    ('data.py', 'out[..., nx:, :ny] = field[..., :h - nx', 'out[..., nx:, :ny] = field[..., nx:h', DATA),
    ('data.py', 'np.float32(1e-3) * size', 'np.float32(1e-9) * size', DATA),
    ('data.py', 'if k == kind])', '])', DATA),
    ('simulate.py', 'if np.max(worst) > limit:', 'if False:', 'tests/test_active_matter.py -k nano'),
    ('simulate.py', "'not resolved' if share >", "'not resolved' if share <", SIMULATE + ' -k unresolved'),
    ('systems/active_matter.py', 'd_t=0.14', 'd_t=0.1', 'tests/test_active_matter.py -k nano'),
    ('systems/active_matter.py', 'self.e = e\n', 'pass\n', 'tests/test_active_matter.py -k nano'),
    ('simulate.py', '[seed, SPLITS.index(split),', '[seed, 0,', SIMULATE + ' -k splits'),
    ('simulate.py', '[seed, SPLITS.index(split),', '[0, SPLITS.index(split),', SIMULATE + ' -k seed'),
    ('simulate.py', 'threads = 1 if fit >= 2 else cores', 'threads = cores', SIMULATE + ' -k cores'),
    ('simulate.py', '            stopped.set()\n', '', SIMULATE + ' -k refused'),
    ('simulate.py', '            torch.set_num_threads(cores)\n', '', SIMULATE + ' -k cores'),
    ('systems/shear_flow.py', 'rng.uniform(-1, 1)\n', '0.0\n', SIMULATE + ' -k anywhere'),
    # statistics
    ('data.py', 'x[i] + (at - i) *', 'x[i] + np.clip(at - i, 0, 1) *', STATISTICS),
    ('systems/numerics.py', 'derivative(v, 0) - grid', 'derivative(v, 0) + grid', STATISTICS),
    ('systems/numerics.py', '(f * self.area.to(f.device)).sum((-2, -1)).mean(1)', 'f.mean((1, 2, 3))',
     STATISTICS),
    ('systems/numerics.py', 'return f.diff(dim=1) / self.dt', 'return f.diff(dim=1)', STATISTICS),
    ('systems/active_matter.py', "+ 2 * f['E_xy']", "+ f['E_xy']", STATISTICS),
    ('systems/rayleigh_benard.py', 'grid.mean(v * b)', 'grid.mean(b)', STATISTICS),
    # probes and fine-tuning
    ('probe.py', 'torch.randperm(len(tokens), generator=generator)', 'torch.arange(len(tokens))', PROTOCOL),
    ('probe.py', 'weight_decay=0.01, warmup', 'weight_decay=0.1, warmup', PROTOCOL),
    ('probe.py', 'warmup_epochs=2, dropout', 'warmup_epochs=0, dropout', PROTOCOL),
    ('probe.py', "estimate('valid') - splits['valid'][1]", "estimate('test') - splits['test'][1]", PROBE),
    ('probe.py', "x, y = splits['valid']", "x, y = splits['train']", PROBE),
    ('probe.py', '((x - mean) / std, splits', '(x - mean, splits', PROBE),
    ('eval.py', 'if noise > 0:', 'if False:', EVAL + ' -k noise'),
    ('eval.py', 'EMBEDDED.index(name), *window)', 'EMBEDDED.index(name), first)', EVAL + ' -k noise'),
    ('eval.py', 'EMBEDDED.index(name)', '0', EVAL + ' -k noise'),
    ('eval.py', 'self.c.seed, 5, ', '5, ', EVAL + ' -k noise'),
    ('eval.py', 'jobs[RANK::WORLD], size', 'jobs[RANK:], size', EVAL + ' -k processes'),
    ('eval.py', 'if RANK == 0:', 'if True:', EVAL + ' -k processes_share'),
    ('common.py', 'if RANK > 0 or WORLD > 1', 'if False:', 'tests/test_errors.py -k torchrun'),
    ('eval.py', 'epochs, scored=scored', "epochs, scored='test'", EVAL + ' -k asked_for'),
    ('eval.py', 'args.seed if args.seed >= 0 else c.seed', '0', EVAL + ' -k seeds'),
    ('baselines/latents.py', "'valid': (z[valid], y[valid])", "'valid': (z, y)",
     'tests/test_disco.py -k published_latents'),
    ('baselines/latents.py', 'torch.randperm(len(z), generator=torch.Generator().manual_seed(0))',
     'torch.arange(len(z))', 'tests/test_disco.py -k published_latents'),
    ('benchmark/finetune.py', "model.parameters(), 'lr': lr}", "model.parameters(), 'lr': 0.0}", PROTOCOL),
    ('benchmark/finetune.py', 'torch.optim.Adam([', 'torch.optim.AdamW([', PROTOCOL),
    ('benchmark/finetune.py', 'factor=0.5,', 'factor=0.1,', PROTOCOL),
    ('baselines/mpp.py', 'share = 0.2 * i', 'share = 0.1 * i', PROTOCOL),
    ('model.py', 'labels.repeat(2, 1)', 'labels.repeat(2, 1).flip(0)', TRAIN + ' -k supervised'),
    # how far an embedding carries
    ('data.py', 'distance.argmax()', 'distance.argmin()', CARRIES + ' -k spread'),
    ('data.py', 'np.minimum(distance', 'np.maximum(distance', CARRIES + ' -k spread'),
    ('data.py', 'z = (labels - labels.mean(0)) / labels.std(0)', 'z = labels - labels.mean(0)',
     CARRIES + ' -k spread'),
    ('data.py', 'turn, distance = left[np.sort(first)]', 'turn, distance = left[first]',
     CARRIES + ' -k twins'),
    ('data.py', 'default_rng([*np.ravel(seed), 6])', 'default_rng([6])', CARRIES + ' -k twins'),
    ('benchmark/generalize.py', 'np.isin(runs, taken)', 'np.isin(runs, taken[:1])',
     CARRIES + ' -k whole_runs'),
    ('benchmark/generalize.py', 'max(1, round(fraction', 'max(2, round(fraction', CARRIES + ' -k whole_runs'),
    ('benchmark/generalize.py', 'distinct[1:-1:2]', 'distinct[1::2]', CARRIES + ' -k between'),
    ('benchmark/generalize.py', "out == (name == 'scored')", "out == (name != 'train')",
     CARRIES + ' -k held_out'),
    ('benchmark/generalize.py', '(e[:, label] - truth)', "(e - splits['scored'][1])",
     CARRIES + ' -k held_out'),
    ('benchmark/generalize.py', '(estimates[p][index, label] - truth)', '(e[:, label] - truth)',
     CARRIES + ' -k held_out'),
    ('benchmark/generalize.py', 'zip(inputs, errors[1:])', 'zip(inputs, errors)', CARRIES + ' -k clean_ones'),
    ('benchmark/generalize.py', "if trained or p != 'attentive'}", '}', CARRIES + ' -k clean_ones'),
    ('benchmark/generalize.py', "clean | {'scored': (tokens, y.repeat(1 + len(inputs), 1))}",
     "clean | dict.fromkeys(('valid', 'scored'), (tokens, y.repeat(1 + len(inputs), 1)))",
     CARRIES + ' -k clean_ones'),
    ('benchmark/generalize.py', 'torch.as_tensor(std).view(-1, 1, 1, 1) * noise', 'noise',
     CARRIES + ' -k channels_size'),
    ('benchmark/generalize.py', 'F.avg_pool2d(x.flatten(0, 1), 2)', 'x.flatten(0, 1)[..., ::2, ::2]',
     CARRIES + ' -k coarse'),
    ('eval.py', '7, *seed[3:]', '7, first', CARRIES + ' -k spoilt_windows'),
    ('eval.py', "self.splits['train'].normalization(True)", "self.splits['train'].normalization(False)",
     CARRIES + ' -k spoilt_windows'),
    ('eval.py', "scored, rows = 'scored' if 'scored' in splits else", 'scored, rows =',
     CARRIES + ' -k carries'),
    ('eval.py', '[seed, 8, draw]', '[0, 8, draw]', CARRIES + ' -k fractions_are'),
    ('eval.py', 'if run.c.label_fraction < 1 else 0', 'if 0 else 0', CARRIES + ' -k as_many_steps'),
    ('eval.py', "self.splits['train'].with_labels(", '(lambda w, *_: w)(', CARRIES + ' -k few_labels'),
    ('train.py', 'data.with_labels(', '(lambda w, *_: w)(', CARRIES + ' -k few_labels'),
    ('data.py', 'windows[np.isin(windows', 'windows[~np.isin(windows', CARRIES + ' -k few_labels'),
    ('train.py', 'or c.label_fraction < 1 and not c.supervised', '', CARRIES + ' -k share_of_labels'),
    # the benchmark
    ('benchmark/cells.py', 'then = defaults | then', 'then = now | then', BENCHMARK + ' -k machine'),
    ('benchmark/cells.py', 'free = {*train.OF_MACHINE', 'free = {*train.MAY_CHANGE', BENCHMARK + ' -k machine'),
    ('benchmark/cells.py', "if words == ['stale: ']:", 'if False:', BENCHMARK + ' -k seed_by_seed'),
    ('benchmark/cells.py', 'step == steps and not differs', 'step == steps', BENCHMARK + ' -k no_beginning'),
    ('benchmark/cells.py', 'if differs := progress(cell)[2]:', 'if False:', BENCHMARK + ' -k anew'),
    ('benchmark/cells.py', '!= {cell.seed}:', '!= {0, 1, cell.seed}:', BENCHMARK + ' -k other_data'),
    ('benchmark/cells.py', 'table.stat().st_mtime >=', '0 <=', BENCHMARK + ' -k scored_again'),
    ('benchmark/cells.py', 'or why_stale(cell, result)[0]:', 'or False:', BENCHMARK + ' -k scored_again'),
    ('benchmark/cells.py', 'if stop.is_set():', 'if False:', BENCHMARK + ' -k ctrl_c'),
    ('benchmark/cells.py', 'except Exception as e:', 'except KeyError as e:', BENCHMARK + ' -k two_jobs'),
    ('benchmark/cells.py', 'ThreadPoolExecutor(jobs)', 'ThreadPoolExecutor(1)', BENCHMARK + ' -k two_jobs'),
    ('benchmark/cells.py', "{'paper-tables', 'fewer-labels'} & {*asked}", 'True', BENCHMARK + ' -k ends_in'),
    ('benchmark/cells.py', "if cell.preset == 'paper':", "if args.preset == 'paper':",
     BENCHMARK + ' -k made_is'),
    # its tables
    ('benchmark/report.py', 'titles.setdefault(str(errors), title)', 'titles[title] = title', TABLES),
    ('benchmark/report.py', 'EXPERIMENT if kind', 'sorted(EXPERIMENT) if kind', TABLES),
    ('benchmark/report.py', '< 2 * spread', '< spread', TABLES),
    ('eval.py', '[0.025, 0.975]', '[0.25, 0.75]', TABLES),
    ('benchmark/report.py', 'ddof=1), np.std(errors, ddof=1)', 'ddof=1), np.std(errors, ddof=0)', TABLES),
    ('benchmark/report.py', '(np.std(errors, ddof=1))', '(np.std(errors, ddof=0))', TABLES),
    ('benchmark/report.py', "(result['seeds']['data'],)", '(cell,)', TABLES),
    ('benchmark/report.py', "if result['split'] != 'test':", 'if False:', TABLES),
    ('benchmark/report.py', 'encoder in floors and', "encoder == 'random' and", TABLES),
    ('benchmark/report.py', "cell.rpartition('-')[0]: row", 'cell: row', TABLES),
    ('benchmark/report.py', "f'{model}: random init{comma}{rest}'", "f'{model}: random init'", TABLES),
    ('benchmark/report.py', "', fine-tuned' if name in models.FINETUNED_IN_PAPER else ''", "''", TABLES),
    ('benchmark/report.py', "t.replace('fine-tuned as in the paper', 'fine-tuned')", 't', TABLES),
    ('benchmark/report.py', "if 'supervised' in title:", 'if False:', TABLES),
    ('benchmark/report.py', "else f'{title}, from scratch'", 'else title', TABLES),
    ('benchmark/report.py', 'in rows.items():', 'in ():', TABLES),
    ('benchmark/report.py', '[seen for _, seen in pairs]', '[unseen for unseen, _ in pairs]', TABLES),
    ('benchmark/report.py', "if r.get('cost')]", ']', TABLES),
    ('benchmark/report.py', "* r['run']['windows_seen']", '', TABLES),
    ('benchmark/report.py', 'if new != text:', 'if False:', TABLES),
    # finding the data
    ('systems/datasets.py', 'if place in visited:', 'if False:', DATASETS + ' -k loops'),
    ('systems/datasets.py', 'islice(queue, MOST)', 'queue', DATASETS + ' -k loops'),
    ('systems/datasets.py', 'elif depth < DEPTH:', 'else:', DATASETS + ' -k loops'),
    ('systems/datasets.py', "n != 'cache' and ", '', DATASETS + ' -k loops'),
    ('systems/datasets.py', ' and not another', '', DATASETS + ' -k is_not_there'),
    ('systems/datasets.py', 'top not in (root, root.parent, ', 'top in (', DATASETS + ' -k other_seeds'),
    ('systems/datasets.py', 'if len(roots) != 1:', 'if not roots:', DATASETS + ' -k two_of_them'),
    ('train.py', 'missing or not told or', 'True or', DATASETS + ' -k is_not_there'),
    ('eval.py', ' and is_complete(', ' or is_complete(', DATASETS + ' -k papers_number'),
    ('eval.py', ' and {*run.system.symbols} <= {*run.shown}', '', DATASETS + ' -k papers_number'),
    # what is reported
    ('probe.py', 'x.mean(0), y.mean(0)', 'x.mean(0), 0 * y.mean(0)', REPORTING + ' -k scikit'),
    ('probe.py', 'r / len(x) * eye', 'r * eye', REPORTING + ' -k scikit'),
    ('probe.py', "if metric == 'cosine':", 'if False:', REPORTING + ' -k angle'),
    ('eval.py', "if attentive and 'attentive' in wanted:", 'if attentive:', REPORTING + ' -k only_the_probes'),
    ('eval.py', 'ridge=args.ridge', 'ridge=0', REPORTING + ' -k only_the_probes'),
    ('eval.py', '(args.k,) if args.k else', '', REPORTING + ' -k only_the_probes'),
    ('eval.py', 'if trained and run.c.supervised and', 'if False and', REPORTING + ' -k head'),
    ('eval.py', "run.state['step']))", '0))', REPORTING + ' -k curve'),
    ('eval.py', 'if begun not in untrained:', 'if True:', REPORTING + ' -k curve'),
    ('eval.py', "if line['step'] < step][-steps:]", '][-steps:]', REPORTING + ' -k curve'),
    ('eval.py', "f'eval-{step}.json' if step.isdigit() else 'eval.json'", "'eval.json'", REPORTING + ' -k curve'),
    ('eval.py', "if alone else str(folder)", "if True else str(folder)", REPORTING + ' -k names'),
    ('train.py', "state.get('machine', 'unknown machine').split(' and ') if state else []", '[]', REPORTING + ' -k cost'),
    ('train.py', 'if step == 0 or not file.exists():', 'if True:', REPORTING + ' -k biases'),
    ('train.py', 'if board and step >= board.step:', 'if board:', REPORTING + ' -k biases'),
    ('train.py', 'if not c.wandb or RANK > 0:', 'if not c.wandb:', REPORTING + ' -k rank_0'),
    ('train.py', 'c.noise * model.std * noise', '0 * noise', REPORTING + ' -k cheap'),
    ('train.py', "(split.labels(names) - raw.mean(0)) / raw.std(0)", "split.labels(names)", REPORTING + ' -k leaves'),
    ('model.py', 'p * (p > 1e-12 * z.shape[1] * size)', 'p.clamp(min=0)', REPORTING + ' -k collapse'),
    ('model.py', 'spread < 0.01 and spread <= 0.25 * size', 'spread < 0.01', REPORTING + ' -k collapse'),
    ('model.py', 'spread < 0.01 and spread <= 0.25 * size', 'spread <= 0.25 * size', REPORTING + ' -k collapse'),
    # the rest
    ('common.py', 'mean.numel() - 1)', 'mean.numel())', 'tests/test_model.py -k spread'),
    ('baselines/disco.py', 'if max_steps > 4', 'if max_steps > 5', 'tests/test_disco.py -k again'),
    ('train.py', '8 * WORLD', '8', TRAIN + ' -k each_rank'),
    ('baselines/mpp.py', 'if not inputs.paired:', 'if False:', 'tests/test_errors.py -k before_anything'),
    # files of every kind
    ('data.py', 'np.float32(mantissa).astype(float)', 'mantissa', FILES + ' -k precisions'),
    ('data.py', 'or d.size not in (1, runs):', ':', FILES + ' -k bad_scalars'),
    ('data.py', "d.attrs.get('time_varying', False)", 'False', FILES + ' -k changes_in_time'),
    ('data.py', 'and (n > 1 or field.varies[axis])', 'and n > 1', FILES + ' -k bad_fields'),
    ('data.py', 'and others <= {1}:', ':', FILES + ' -k not_vary'),
    ('data.py', 'if channel in channels:', 'if False:', FILES + ' -k bad_fields'),
    ('data.py', "cartesian = set(first['axes']) <= set('xyz')", 'cartesian = True', FILES + ' -k any_names'),
    ('data.py', 'in enumerate(self.frames)', 'in enumerate(0 * self.frames + 40)', FILES + ' -k own_frames'),
    ('data.py', 'np.moveaxis(x, axis - 1, -1)', 'x', FILES + ' -k coordinates'),
    ('data.py', 'std > 1e-5 * size', 'std > 1e-3 * size', FILES + ' -k small'),
    ('train.py', 'data.frames[run] - FRAMES', 'max(data.frames) - FRAMES', FILES + ' -k own_frames'),
    ('common.py', 'part.unlink(missing_ok=True)', 'pass', FILES + ' -k full_disk'),
    # few labels: the fields of the other runs are there all the same
    ('eval.py', "            windows['unlabelled'] = windows['train']", '            pass', CARRIES + ' -k trained_with_few'),
    ('eval.py', "np.full_like(of_runs['train'], np.nan)", "of_runs['train']", CARRIES + ' -k trained_with_few'),
    ('benchmark/generalize.py', "clean.get('unlabelled', clean['train'])", "clean['train']", CARRIES + ' -k trained_with_few'),
    # faults
    ('systems/datasets.py', 'not isinstance(link, h5py.HardLink)', 'False', FAULTS + ' -k odd_files'),
    ('systems/datasets.py', 'found.is_virtual or found.external', 'found.external', FAULTS + ' -k odd_files'),
    ('systems/datasets.py', 'found.is_virtual or found.external', 'found.is_virtual', FAULTS + ' -k odd_files'),
    ('systems/datasets.py', 'DENSE = 2000', 'DENSE = 50', FAULTS + ' -k packs_well'),
    ('systems/datasets.py', 'if size > max(SMALL', 'if False and size > max(SMALL', FAULTS + ' -k odd_files'),
    ('data.py', "d = member(f['dimensions'], name, f.filename)", "d = f['dimensions'].get(name)", FAULTS + ' -k odd_files'),
    ('data.py', "d = member(f['scalars'], name, path)", "d = f['scalars'].get(name)", FAULTS + ' -k odd_files'),
    ('data.py', "list(fields.shape) == about['shape']", "True", FAULTS + ' -k damaged_cache'),
    ('data.py', 'if fields.dtype == np.float32 and', 'if', FAULTS + ' -k damaged_cache'),
    ('common.py', 'if sum(part.file_size for part', 'if False and sum(part.file_size for part', FAULTS + ' -k no_larger'),
    ('train.py', "raise OSError(f'{path} cannot be written: {e.strerror}')", 'raise OSError(e.strerror)', FAULTS + ' -k each_script'),
    ('train.py', 'if v != default and isinstance', 'if isinstance', TRAIN + ' -k folder_of_its_own'),
    ('train.py', "c.preset, *words, f'seed", "c.preset, f'seed", TRAIN + ' -k folder_of_its_own'),
    ('simulate.py', 'file = io.BytesIO()', "file = path.with_name('part')", FAULTS + ' -k ends_a_simulation'),
    # chosen by a reader, who thought that nothing would notice
    ('systems/rayleigh_benard.py', 'nu, kappa = (ra / pr)', 'kappa, nu = (ra / pr)', FLUIDS + ' -k only_diffuses'),
    ('systems/shear_flow.py', '1 / Re / Sc * k2', '1 / Re * Sc * k2', FLUIDS + ' -k only_diffuses'),
    ('systems/shear_flow.py', 'shuffled[ends[split]:ends[split + 1]]', 'shuffled', FLUIDS + ' -k wells_starts'),
    ('systems/active_matter.py', '(c + m.real) / 2, m.imag / 2, m.imag / 2,', '(c + m.real) / 2, -m.imag / 2, -m.imag / 2,',
     'tests/test_active_matter.py -k of_the_rods'),
    ('systems/numerics.py', "'diffusivity': lost(mixed)", "'diffusivity': lost(s)", STATISTICS + ' -k drifts'),
    ('jepa.py', 'SmallEncoder(channels, options.widths, options.rate)', 'SmallEncoder(channels, options.widths)',
     'tests/test_jepa.py -k reach_them'),
    ('jepa.py', 'chunks=o.chunks, generator=generator)', 'chunks=o.chunks)', 'tests/test_jepa.py -k reach_them'),
    ('videomae.py', 'decoder_heads=heads, mask_ratio=o.mask_ratio)', 'decoder_heads=heads)', 'tests/test_videomae.py -k reaches'),
    ('train.py', 'c.augment, seeds(3)', 'False, seeds(3)', PROTOCOL + ' -k are_turned'),
    ('data.py', 'for s in self.symmetries if h == w', 'for s in self.symmetries if H == W', FILES + ' -k square_crops'),
    ('eval.py', "noise = protocol.pop('noise', None)", "protocol.pop('noise', None)", EVAL + ' -k papers_probe'),
    ('probe.py', 'mlp_ratio, 8, dropout).to(device)', 'mlp_ratio, 8).to(device)', EVAL + ' -k papers_probe'),
    ('eval.py', 'epochs = max(epochs, args.epochs)', 'epochs = args.epochs', PROBE + ' -k few_windows'),
    ('eval.py', 'for k in run.labels], 1)[which]', 'for k in run.labels], 1)[which[::-1]]', EVAL + ' -k kept_embeddings'),
    ('eval.py', 'mlp_ratio=run.mlp_ratio, seed=run.probe_seed', 'mlp_ratio=run.mlp_ratio, seed=0', EVAL + ' -k seeds_reach'),
]


def mistakes():
    """What is wrong with the list, a line each: sources that do not occur once, tests that are not there."""
    found = []
    for file, old, _, tests in MUTANTS:
        path, words, names = HERE / file, tests.split(), []
        count = path.read_text().count(old) if path.is_file() else 0
        if count != 1:
            found.append(f'{file} has {old!r} {count} times')
        for before, word in zip(['', *words], words):
            # a file of tests, or one test of it
            if before != '-k' and not word.startswith('-'):
                place, _, name = word.partition('::')
                there = (HERE / place).read_text() if (HERE / place).is_file() else ''
                names += (own := re.findall(r'^def (test_\w+)', there, re.MULTILINE))
                if not own or name and name not in own:
                    found.append(f'{file}, {old!r}: no {word}')
            if before == '-k' and not any(word in name for name in names):
                found.append(f'{file}, {old!r}: no test in {words[0]} has {word} in its name')
    return found


def copied(folder):
    """A copy of all that is ours: no data, runs and environments, which lie at the top."""
    def left_out(place, names):
        at_top = {'.git', '.venv', 'venv', 'data', 'out', 'rows', 'build'} if Path(place) == HERE else set()
        return {'__pycache__', '.pytest_cache'} | at_top
    return Path(shutil.copytree(HERE, folder / 'house', ignore=left_out))


def survives(file, old, new, tests, folder):
    """Do the tests pass although the line is broken?"""
    house = copied(folder)
    text = (house / file).read_text()
    (house / file).write_text(text.replace(old, new, 1))
    p = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', *tests.split()], cwd=house,
                       capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if p.returncode > 1:                                                 # not by a signal, as where HDF5 aborts
        raise SystemExit(f'error: {tests}: {p.stdout}{p.stderr}')
    return p.returncode == 0


def main():
    words = sys.argv[1:]
    if wrong := mistakes():
        raise SystemExit('\n'.join([*wrong, 'error: mend tests/mutants.py']))
    if words == ['--check']:
        print(f'{len(MUTANTS)} mutants, and each has its line and its tests')
        return

    survivors, sound = 0, set()
    for file, old, new, tests in MUTANTS:
        if words and not any(word in ' '.join((file, old, new, tests)) for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if tests not in sound and not survives(file, old, old, tests, Path(folder) / 'unbroken'):
                raise SystemExit(f'error: {tests} fails with nothing broken')
            sound.add(tests)
            alive = survives(file, old, new, tests, Path(folder))
        survivors += alive
        print('SURVIVED' if alive else 'killed  ', f'{file}: {old.strip()} -> {new.strip()}', flush=True)
    sys.exit(survivors > 0)


if __name__ == '__main__':
    main()
