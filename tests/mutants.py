"""
Do the tests bite? Breaks one line at a time, in a copy, and runs the tests that should notice.

    python tests/mutants.py                # all: about half an hour on a core
    python tests/mutants.py betas noise    # those with one of these words in their line

A mutant that passes its tests has survived: exit code 1, and a test is missing. Not part of the test suite.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PROTOCOL, EVAL, DATA, STATISTICS = (f'tests/test_{name}.py' for name in ('protocol', 'eval', 'data', 'statistics'))
PROBE, TRAIN, VICREG = (f'tests/test_{name}.py' for name in ('probe', 'train', 'vicreg'))
LOSSES, VJEPA, PIXELS, CACHE = (f'tests/test_{name}.py' for name in ('losses', 'vjepa', 'pixels', 'cache'))
BENCH, LOADER = 'tests/test_bench.py', 'tests/test_bench_loader.py'
REMOTE, STEP = 'tests/test_remote.py', 'tests/test_step.py'
TABLES = 'tests/test_report.py --deselect tests/test_report.py::test_the_pages_say_what_results_says'
BENCHMARK, CARRIES = 'tests/test_benchmark.py', 'tests/test_generalize.py'
RANKS = 'test_all.py::test_two_ranks_equal_one_process'

MUTANTS = [                                                              # file, what stands there, what instead, tests
    # the loop
    ('train.py', 'betas=(0.9, 0.95)', 'betas=(0.9, 0.999)', PROTOCOL),
    ('config.py', "weight_decay: float = of_optimisation(0.05", "weight_decay: float = of_optimisation(0.0", PROTOCOL),
    ('config.py', 'warmup_epochs=0.5)}', 'warmup_epochs=0.0)}', TRAIN + ' -k settings'),
    ('train.py', '0.5 * (1 + math.cos', '0.5 * (0.8 + math.cos', TRAIN + ' -k schedule'),
    ('train.py', '[seed, 1, epoch]', '[seed, 1]', TRAIN + ' -k every_window'),
    ('train.py', "(losses['loss'] / accumulate).backward()", "losses['loss'].backward()", TRAIN + ' -k accumulated'),
    ('train.py', 'model.network.after_step((step + 1) / steps)', 'pass', 'tests/test_house.py -k model_is_one_file'),
    ('common.py', 'dist.broadcast_object_list(values, src=0)', 'pass', 'test_all.py -k disks_of_their_own'),
    ('train.py', 'if c.noise > 0:', 'if False:', PROTOCOL),
    ('train.py', 'x = x + c.noise * torch.randn', 'x = x + torch.randn', PROTOCOL),
    ('model.py', 'enabled=self.mixed', 'enabled=False', PROTOCOL),
    ('config.py', "'paper': dict(dtype='float32'", "'paper': dict(dtype='bfloat16'", PROTOCOL),
    ('train.py', 'del forward', 'pass', RANKS),
    ('train.py', "group['fused'] = c.device == 'cuda'", 'pass', STEP + ' -k adamw'),
    ('train.py', 'if saving or step % c.log_every == 0:', 'if step % c.log_every == 0:', STEP + ' -k every_few'),
    ('vicreg.py', 'sent(torch.randperm(len(x), generator=generator), x.device)',
     'torch.randperm(len(x), generator=generator).to(x.device)', STEP + ' -k waits'),
    ('model.py', 'block.forward = functools', 'kept = functools', STEP + ' -k again'),
    ('train.py', '(c.seed, 2 + v, step, first + i)', '(c.seed, 2, step, first + i)', PROTOCOL),
    ('train.py', 'abs(s - t) >= FRAMES', 'abs(s - t) >= 1', PROTOCOL),
    ('train.py', 'standard_labels[windows[:, 0]]', 'standard_labels[windows[:, 1] % 3]', PROTOCOL),
    ('videomae.py', "parameter.ndim == 1 or name == 'mask_token'", 'parameter.ndim == 1', PROTOCOL),
    # settings of the paper
    ('systems/shear_flow.py', 'lr=1e-4', 'lr=1e-3', PROTOCOL),
    ('systems/shear_flow.py', 'epochs=6.0', 'epochs=30.0', PROTOCOL),
    ('systems/shear_flow.py', 'stride=4', 'stride=1', PROTOCOL),
    ('systems/shear_flow.py', 'noise=1.0', 'noise=0.0', PROTOCOL),
    ('jepa.py', "'active_matter': 0.079", "'active_matter': 0.160", PROTOCOL),
    ('jepa.py', "loss_rows: str = option('local'", "loss_rows: str = option('global'", PROTOCOL),
    # the cache, and tokens that memory does not hold
    ('cache.py', "KINDS[kind], 'r', shape", "KINDS[kind], 'c', shape", CACHE),
    ('cache.py', 'if i not in found], of.bytes', 'if i + 1], of.bytes', CACHE + ' -k killed'),
    ('cache.py', 'if needed > free:', 'if False:', CACHE + ' -k hold'),
    ('cache.py', '(high - low) / 65534, (high', '(high - low) / 32767, (high', CACHE + ' -k int16'),
    ('cache.py', 'if step > 0.01 * std:', 'if step > 0.1 * std:', CACHE + ' -k int16'),
    ('cache.py', 'out.seek(of.first[number]', 'out.seek(of.first[0]', CACHE + ' -k processes'),
    ('cache.py', 'run - self.of.first[number], frames', '0, frames', CACHE + ' -k without'),
    ('cache.py', 'if resolution > max(own)', 'if False', DATA + ' -k grow'),
    ('remote.py', 'os.replace(part.name, path)', 'return open(part.name, "rb")', REMOTE + ' -k second'),
    ('remote.py', 'if len(content) != end - start:', 'if False:', REMOTE + ' -k short'),
    ('remote.py', 'class StoreError(Exception)', 'class StoreError(OSError)', REMOTE + ' -k goes_on'),
    ('remote.py', 'shutil.rmtree(path.blocks, ignore_errors=True)', 'pass', REMOTE + ' -k one_at_a_time'),
    ('cache.py', 'len(of.files) + sum(passing)', 'len(of.files)', REMOTE + ' -k hold'),
    ('probe.py', 'max(1, PART // (4', 'max(9, PART // (4', PROBE),
    # what the benchmark counts
    ('bench_steps.py', 'return sum(wanted[:2]) * 2', 'return sum(wanted[:2]) * groups * 2', BENCH + ' -k convolutions'),
    ('bench_steps.py', '(3 * q[3] + 2 * v[3])', '(2 * q[3] + 2 * v[3])', BENCH + ' -k attention'),
    ('bench_steps.py', 'sum(d > 3 for d in apart)', 'sum(d > 2 for d in apart)', BENCH + ' -k depthwise'),
    ('bench_steps.py', "group['lr'] = 0.0", 'pass', BENCH + ' -k training_step'),
    ('bench_loader.py', 'source.n_windows_per_trajectory[0], 1]', '0, 1]', LOADER + ' -k both_loaders'),
    ('bench_loader.py', 'loaded.seconds - waited', 'loaded.seconds', LOADER + ' -k waiting'),
    # losses
    ('vicreg.py', 'unbiased=False', 'unbiased=True', VICREG),
    ('vicreg.py', 'cov.diagonal().pow(2).sum()) / D', 'cov.diagonal().pow(2).sum())', VICREG),
    ('vicreg.py', 'grad.chunk(world)[rank] * world', 'grad.chunk(world)[rank]', RANKS),
    ('jepa.py', "gather if loss_rows == 'global'", "gather if loss_rows == 'any'", RANKS),
    ('encoders.py', 'factor=8.0', 'factor=1.0', 'tests/test_jepa.py'),
    ('encoders.py', 'torch.asinh(8 * means)', 'means', 'tests/test_jepa.py'),
    ('encoders.py', 'products = a * b', 'products = a', 'tests/test_jepa.py'),
    ('jepa.py', 'p = z + p', 'p = p + 0', 'tests/test_jepa.py'),
    # the other losses, the teacher, masked latents, pixels
    ('sigreg.py', 'weights[-1] /= 2', 'pass', LOSSES), ('sigreg.py', '2 * reach / (', 'reach / (', LOSSES),
    ('sigreg.py', '(sigreg(x, a) + sigreg(y, a)) / 2', 'sigreg(x, a)', LOSSES),
    ('infonce.py', 'similarity.T, own', 'similarity, own', LOSSES),
    ('ema.py', 'slow.lerp_(fast, 1 - m)', 'slow.lerp_(fast, m)', LOSSES),
    ('ema.py', '(end - start) * progress', '0.0 * progress', LOSSES),
    ('jepa.py', 'z_next = self.teacher(target)', 'z_next = self.encoder(target)', LOSSES),
    ('vjepa.py', 'return F.layer_norm(y, y.shape[-1:])', 'return y', VJEPA),
    ('vjepa.py', '+ mask).argsort', ').argsort', VJEPA),
    ('vjepa.py', '(full := hidden.flatten(1).all(1)).any()', '(full := hidden.flatten(1).all(1)).all()', VJEPA),
    ('vjepa.py', 'max(1, round((area / aspect)', 'max(1, round((area * aspect)', VJEPA),
    ('vjepa.py', "option((0.996, 1.0)", "option((0.9, 1.0)", VJEPA),
    ('vjepa.py', 'i[:, RANK * B:(RANK + 1) * B]', 'i[:, :B]', RANKS),
    ('vjepa.py', 'in_full(gather(z))', 'in_full(z)', RANKS),
    ('pixels.py', 'self.place[:, None, :, None]', 'self.place[:, :, None, None].transpose(1, 3)', PIXELS),
    ('train.py', 'asdict(type(options)())', 'dict()', TRAIN + ' -k younger'),
    ('videomae.py', 'waves < 2, (waves >= 2)', 'waves < 3, (waves >= 3)', 'tests/test_videomae.py -k missed'),
    ('videomae.py', 'basis[0] /= 2**0.5', 'pass', 'tests/test_videomae.py -k missed'),
    ('videomae.py', 'dist.all_reduce(energy)', 'pass', 'tests/test_videomae.py -k ranks'),
    ('pixels.py', 'x = normalized_pixels(patchify(target', 'x = normalized_pixels(patchify(context', PIXELS),
    ('eval.py', '[-last:]', '[:last]', EVAL + ' -k log_ends'),
    ('report.py', 'if errors in shown:', 'if False:', TABLES),
    ('report.py', 'for name in EXPERIMENT:', 'for name in sorted(there):', TABLES),
    ('figures.py', 'y, seeds = i + ', 'y, seeds = len(rows) + ', 'tests/test_figures.py'),
    ('figures.py', 'ddof=len(by[share]) > 1', 'ddof=0', 'tests/test_figures.py'),
    ('figures.py', "what['gflop'] * what['windows']", "what['gflop']", 'tests/test_figures.py'),
    ('figures.py', "of == ('linear' if title in SHARED else p)", "of == 'linear'", 'tests/test_figures.py'),
    ('plot.py', 'if pair in found]', ']', 'tests/test_figures.py'),
    ('videomae.py', 'rank * batch:(rank + 1) * batch', ':batch', 'tests/test_videomae.py -k ranks'),
    # data
    ('data.py', 'np.log10(self.scalars[n]) if n in', 'self.scalars[n] if n in', DATA + ' tests/test_model.py'),
    ('data.py', "settings = f'{split}-{resolution or", "settings = f'train-{resolution or", CACHE),
    ('cache.py', "{path.name} {s.st_size} {s.st_mtime_ns}", "{path.name}", CACHE),
    ('data.py', 'channels.index(source)], sign, out', 'channels.index(source)], 1, out', DATA),
    ('data.py', 'out[..., nx:, :ny] = field[..., :h - nx', 'out[..., nx:, :ny] = field[..., nx:h', DATA),
    ('data.py', 'np.float32(1e-3))', 'np.float32(1e-9))', DATA),
    ('data.py', 'if other == name]', ']', DATA),
    ('simulate.py', 'if np.max(worst) > limit:', 'if False:', 'tests/test_active_matter.py -k nano'),
    ('simulate.py', '"not resolved" if share >', '"not resolved" if share <', 'tests/test_simulate.py -k unresolved'),
    ('systems/active_matter.py', 'd_t=0.14', 'd_t=0.1', 'tests/test_active_matter.py -k nano'),
    ('systems/active_matter.py', 'self.e = e\n', 'pass\n', 'tests/test_active_matter.py -k nano'),
    ('simulate.py', '[seed, SPLITS.index(split),', '[seed, 0,', 'tests/test_simulate.py -k splits'),
    ('simulate.py', '[seed, SPLITS.index(split),', '[0, SPLITS.index(split),', 'tests/test_simulate.py -k seed'),
    ('simulate.py', 'threads = 1 if fit >= 2 else cores', 'threads = cores', 'tests/test_simulate.py -k cores'),
    ('simulate.py', '            stopped.set()\n', '', 'tests/test_simulate.py -k refused'),
    ('simulate.py', '            torch.set_num_threads(cores)\n', '', 'tests/test_simulate.py -k cores'),
    ('systems/shear_flow.py', 'rng.uniform(-1, 1)\n', '0.0\n', 'tests/test_simulate.py -k anywhere'),
    ('report.py', '< 2 * np.hypot', '< np.hypot', TABLES),
    # statistics
    ('cache.py', 'own[i] + (at - i) *', 'own[i] + np.clip(at - i, 0, 1) *', STATISTICS),
    ('systems/numerics.py', 'derivative(v, 0) - grid', 'derivative(v, 0) + grid', STATISTICS),
    ('systems/numerics.py', '(f * self.area.to(f.device)).sum((-2, -1)).mean(1)', 'f.mean((1, 2, 3))', STATISTICS),
    ('systems/numerics.py', 'return f.diff(dim=1) / self.dt', 'return f.diff(dim=1)', STATISTICS),
    ('systems/active_matter.py', "+ 2 * f['E_xy']", "+ f['E_xy']", STATISTICS),
    ('systems/rayleigh_benard.py', 'grid.mean(v * b)', 'grid.mean(b)', STATISTICS),
    # probes, fine-tuning and tables
    ('probe.py', 'torch.randperm(len(tokens), generator=generator)', 'torch.arange(len(tokens))', PROTOCOL),
    ('probe.py', 'weight_decay=0.01, warmup', 'weight_decay=0.1, warmup', PROTOCOL),
    ('probe.py', 'warmup_epochs=2, dropout', 'warmup_epochs=0, dropout', PROTOCOL),
    ('probe.py', "estimates('valid') - splits['valid'][1]", "estimates('test') - splits['test'][1]", PROBE),
    ('probe.py', "splits['valid'][0] @ w - splits['valid'][1]", "splits['train'][0] @ w - splits['train'][1]", PROBE),
    ('probe.py', '((x - mean) / std, splits', '(x - mean, splits', PROBE),
    ('embed.py', 'if noise > 0:', 'if False:', EVAL + ' -k noise'),
    ('embed.py', '(*where, *window)', '(*where, first)', EVAL + ' -k noise'),
    ('embed.py', 'SPLITS.index(name)', '0', EVAL + ' -k noise'),
    ('embed.py', 'self.c.seed, 5, ', '5, ', EVAL + ' -k noise'),
    ('embed.py', 'jobs[RANK::WORLD], size', 'jobs[RANK:], size', EVAL + ' -k processes'),
    ('embed.py', 'run = Run(path, args, state)', 'run = Run(path, args)', EVAL + ' -k processes_share'),
    ('embed.py', 'failed = failed or tokens', 'pass', EVAL + ' -k left_out'),
    ('common.py', 'if RANK > 0:  ', 'if False:  ', 'tests/test_errors.py -k torchrun'),
    ('eval.py', 'scored=scored, seed=seed', "scored='test', seed=seed", EVAL + ' -k asked_for'),
    ('embed.py', 'args.seed if args.seed >= 0 else c.seed', '0', EVAL + ' -k seeds'),
    ('eval.py', "'valid': (z[mixed[:half]], y[mixed[:half]])", "'valid': (z, y)", EVAL + ' -k latents'),
    ('finetune.py', "'params': model.parameters(), 'lr': lr}", "'params': model.parameters(), 'lr': 0.0}", PROTOCOL),
    ('finetune.py', "torch.optim.Adam([", "torch.optim.AdamW([", PROTOCOL),
    ('finetune.py', 'factor=0.5, patience=5', 'factor=0.1, patience=5', PROTOCOL),
    ('baselines/mpp.py', 'share = 0.2 * i', 'share = 0.1 * i', PROTOCOL),
    ('tables.py', '[0.025, 0.975]', '[0.25, 0.75]', TABLES),
    ('report.py', 'np.std(values, ddof=1)', 'np.std(values, ddof=0)', TABLES),
    ('report.py', '± {number(np.std(values, ddof=1))', '± {number(np.std(values, ddof=0))', TABLES),
    ('report.py', "rows[row].setdefault(r['seeds']['data'], found)", 'rows[row].setdefault(file, found)', TABLES),
    ('report.py', "or r['split'] != 'test'", '', TABLES),
    ('report.py', "if row == 'random init' and", "if row == 'random' and", TABLES),
    ('report.py', "(same, as_trained, 'name')", "(r, as_trained, 'name')", TABLES),
    ('supervised.py', 'labels.repeat(2, 1)', 'labels.repeat(2, 1).flip(0)', TRAIN + ' -k supervised'),
    ('eval.py', "if not c.get('supervised')", 'if True', TRAIN + ' -k supervised'),
    ('eval.py', 'torch.randperm(len(z), generator=torch.Generator().manual_seed(0))', 'torch.arange(len(z))',
     EVAL + ' -k latents'),
    # how far an embedding carries
    ('data.py', 'distance.argmax()', 'distance.argmin()', CARRIES + ' -k spread'),
    ('data.py', 'np.minimum(distance', 'np.maximum(distance', CARRIES + ' -k spread'),
    ('data.py', 'labels.mean(0)) / labels.std(0)\n    left', 'labels.mean(0))\n    left', CARRIES + ' -k spread'),
    ('data.py', 'turn, distance = left[np.sort(first)]', 'turn, distance = left[first]', CARRIES + ' -k twins'),
    ('data.py', 'default_rng([seed, 6])', 'default_rng([6])', CARRIES + ' -k twins'),
    ('benchmark.py', "not Path(cell.data, cell.system, 'stats.yaml').exists()", 'True', BENCHMARK + ' -k dry_run'),
    ('generalize.py', 'np.isin(runs, taken)', 'np.isin(runs, taken[:1])', CARRIES + ' -k whole_runs'),
    ('generalize.py', 'max(1, round(fraction', 'max(2, round(fraction', CARRIES + ' -k whole_runs'),
    ('generalize.py', 'distinct[1:-1:2]', 'distinct[1::2]', CARRIES + ' -k between'),
    ('generalize.py', "(name == 'scored'))[:, 0]", "(name != 'train'))[:, 0]", CARRIES + ' -k held_out'),
    ('generalize.py', "(e[:, label] - truth)", "(e - part['scored'][1])", CARRIES + ' -k held_out'),
    ('generalize.py', "(estimates[p][out['scored'], label] - truth)", "(e[:, label] - truth)",
     CARRIES + ' -k held_out'),
    ('generalize.py', 'mean_errors({p: e[1 + i] for', 'mean_errors({p: e[i] for', CARRIES + ' -k clean_ones'),
    ('generalize.py', "if trained or p != 'attentive'}", '}', CARRIES + ' -k clean_ones'),
    ('generalize.py', "fit({**clean, 'scored': everything}", "fit({**clean, 'valid': everything, 'scored': everything}",
     CARRIES + ' -k clean_ones'),
    ('generalize.py', 'torch.as_tensor(std).view(-1, 1, 1, 1) * torch', 'torch', CARRIES + ' -k channels_size'),
    ('generalize.py', 'F.avg_pool2d(x.reshape(B * C, T, H, W), 2)', 'x.reshape(B * C, T, H, W)[..., ::2, ::2]',
     CARRIES + ' -k coarse'),
    ('embed.py', '(*where, 7, *window)', '(*where, 7, first)', CARRIES + ' -k spoilt_windows'),
    ('embed.py', "(_, std) = self.function(what, noise), self.splits['train'].normalization(True)",
     "(_, std) = self.function(what, noise), self.splits['train'].normalization(False)",
     CARRIES + ' -k spoilt_windows'),
    ('eval.py', "return 'scored' if 'scored' in splits else", 'return', CARRIES + ' -k carries'),
    ('eval.py', "[run.c.seed, 8]", '[0, 8]', CARRIES + ' -k fractions_are'),
    ('eval.py', 'if run.c.label_fraction < 1 else 0)', 'if 0 else 0)', CARRIES + ' -k as_many_steps'),
    ('embed.py', "self.splits['train'].with_labels(windows['train'], ", "(lambda w, *_: w)(windows['train'], ",
     CARRIES + ' -k few_labels'),
    ('train.py', 'data.with_labels(', '(lambda w, *_: w)(', CARRIES + ' -k few_labels'),
    ('data.py', 'windows[np.isin(windows', 'windows[~np.isin(windows', CARRIES + ' -k few_labels'),
    ('config.py', 'or c.label_fraction < 1 and not c.supervised', '', CARRIES + ' -k share_of_labels'),
    # the benchmark
    ('benchmark.py', 'pass_fds=[lock] if lock is not None else []', 'pass_fds=[]',
     'tests/test_killed.py -k left_behind'),
    ('benchmark.py', 'there = younger | there', 'there = now | there', BENCHMARK + ' -k machine'),
    ('benchmark.py', " - {'steps', 'epochs'}\n", '\n', BENCHMARK + ' -k machine'),
    ('benchmark.py', 'if there and not differs:', 'if False:', BENCHMARK + ' -k seed_by_seed'),
    ('benchmark.py', 'if state and not differs else', 'if state else', BENCHMARK + ' -k no_beginning'),
    ('benchmark.py', '            self.run.rename(old)', '            pass', BENCHMARK + ' -k anew'),
    ('benchmark.py', '            if old.exists():', '            if False:', BENCHMARK + ' -k anew'),
    ('benchmark.py', "!= {self.seed}:", '!= {0, 1, self.seed}:', BENCHMARK + ' -k other_data'),
    ('benchmark.py', "or table.stat().st_mtime <", 'or 0 >', BENCHMARK + ' -k scored_again'),
    ('benchmark.py', "or self.why_stale(known)[0]):", 'or False):', BENCHMARK + ' -k scored_again'),
    ('benchmark.py', "'training': 1 - step / max(1, steps)", "'training': 1", BENCHMARK + ' -k earlier'),
    ('benchmark.py', "alike(cell.system, cell.row) or", '', BENCHMARK + ' -k earlier'),
    ('benchmark.py', "r['run']['settings']['supervised'] == own['supervised']", 'True', BENCHMARK + ' -k earlier'),
    ('benchmark.py', 'pool.shutdown(wait=False, cancel_futures=True)', 'pass', BENCHMARK + ' -k ctrl_c'),
    ('benchmark.py', 'except Exception as e:', 'except KeyError as e:', BENCHMARK + ' -k two_jobs'),
    ('benchmark.py', 'ThreadPoolExecutor(jobs)', 'ThreadPoolExecutor(1)', BENCHMARK + ' -k two_jobs'),
    ('report.py', "{'paper-tables', 'fewer-labels'} & {*asked}", 'True', BENCHMARK + ' -k ends_in'),
    ('report.py', "or name == 'longest' for", 'for', BENCHMARK + ' -k ends_in'),
    ('benchmark.py', 'places.put(gpus[k::jobs])', 'places.put(gpus)', BENCHMARK + ' -k gpus'),
    ('benchmark.py', 'if self.stopped.is_set():', 'if False:', BENCHMARK + ' -k ctrl_c'),
    ('benchmark.py', "os.environ.get('CUDA_VISIBLE_DEVICES') or", '', BENCHMARK + ' -k gpus'),
    ('benchmark.py', 'execute(self.evaluate, len(gpus))', 'execute(self.evaluate, 1)', BENCHMARK + ' -k gpus'),
    ('benchmark.py', "cell.preset == 'paper' and not", "args.preset == 'paper' and not", BENCHMARK + ' -k made_is'),
    # its tables
    ('report.py', "f'{model}: random init{comma}{rest}'", "f'{model}: random init'", TABLES),
    ('report.py', "', fine-tuned' * getattr(m, 'PAPER_FINETUNED', False)", "''", TABLES),
    ('report.py', "title.replace(', fine-tuned as in the paper', ', fine-tuned')", 'title', TABLES),
    ('report.py', "if 'supervised' not in title:", 'if True:', TABLES),
    ('report.py', "if title.endswith('supervised'):", 'if False:', TABLES),
    ('report.py', 'for row, fraction in FEWER[preset].items():', 'for row, fraction in ():', TABLES),
    ('report.py', 'np.mean([b for _, b in pair])', 'np.mean([a for a, _ in pair])', TABLES),
    ('report.py', "if of_run.get('cost')]", ']', TABLES),
    ('report.py', 'if new != text:', 'if False:', TABLES),
    ('common.py', '/ math.sqrt(n - 1)', '/ math.sqrt(n)', 'tests/test_model.py -k spread'),
    ('baselines/disco.py', 'again if max_steps > 4', 'again if max_steps > 5', 'tests/test_disco.py -k again'),
    ('config.py', '8 * WORLD', '8', TRAIN + ' -k each_rank'),
    ('config.py', "getattr(module, 'PAIRED', False)", 'False', 'tests/test_errors.py -k before_anything'),
]


def survives(file, old, new, tests, folder):
    """Do the tests pass although the line is broken?"""
    house = Path(shutil.copytree(HERE, folder / 'house', ignore=shutil.ignore_patterns(
        '.git', 'data', 'out', '__pycache__', '.pytest_cache', '.venv', 'venv')))
    text = (house / file).read_text()
    if text.count(old) < 1:
        raise SystemExit(f'error: {file} has no {old!r}: mend tests/mutants.py')
    (house / file).write_text(text.replace(old, new, 1))
    p = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', *tests.split()], cwd=house, capture_output=True,
                       text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if p.returncode not in (0, 1):
        raise SystemExit(f'error: {tests}: {p.stdout}{p.stderr}')
    return p.returncode == 0


def main():
    words = sys.argv[1:]
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
