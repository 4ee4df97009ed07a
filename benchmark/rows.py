"""
What is run for the tables: a row is one setting of train.py, made in a system with several seeds (benchmark.py).

    SYSTEM-ROW-seedN    one cell, in results/SYSTEM-ROW-seedN.json
"""
from systems import system_names

ROWS = {                                                                 # after SYSTEM-: what train.py is told
    'jepa-nano': '--model jepa',
    'jepa-nano-supervised': '--model jepa --supervised',
    # a third of nano's windows, 25,600
    'jepa-nano-vicreg': '--model jepa --steps 800',
    'videomae-nano': '--model videomae --steps 800',
    'mpp-nano': '--model mpp --steps 1600 --lr 1e-2',
    'disco-nano': '--model disco --steps 1600',
    'jepa-nano-short-supervised': '--model jepa --steps 800 --supervised',
    # of these, what is predicted, and how a constant is prevented
    'jepa-nano-paired': '--model jepa --steps 800 --views paired',
    'pixels-nano': '--model pixels --steps 800',
    'jepa-nano-sigreg': '--model jepa --steps 800 --loss sigreg --standardize false --sigreg-coeff 0.05',
    'jepa-nano-ema': '--model jepa --steps 800 --target ema --cov-coeff 0',
    'jepa-nano-infonce': '--model jepa --steps 800 --loss infonce --temperature 0.2',
    'vjepa-nano-block': '--model vjepa --steps 3200 --masks block',
    'vjepa-nano-random': '--model vjepa --steps 3200 --masks random',
    'vjepa-nano-temporal': '--model vjepa --steps 3200 --masks temporal',
    'vjepa-nano-supervised': '--model vjepa --steps 3200 --supervised',
}
# the same encoder, that is shown a part of the labels
FEWER = {'nano': {f'jepa-nano-short-supervised-{percent}': percent / 100 for percent in (1, 2, 5, 10, 20, 50)},
         'paper': {f'jepa-paper-supervised-{percent}': percent / 100 for percent in (10, 50)}, 'smoke': {}}
ROWS |= {row: f'--model jepa --{of} --supervised --label-fraction {share}'
         for preset, of in (('nano', 'steps 800'), ('paper', 'preset paper')) for row, share in FEWER[preset].items()}
# `paper` trains MPP and DISCO from nothing: with their published files, add --init FILE --steps 0
ROWS |= {f'{model}-{preset}': f'--model {model} --preset {preset}' for preset in ('paper', 'smoke')
         for model in ('jepa', 'videomae', 'mpp', 'disco')}
ROWS['jepa-paper-supervised'] = '--model jepa --preset paper --supervised'

SCORED = {                                                               # and eval.py, beside the split
    **{row: '--generalize' for row in ('jepa-nano-vicreg', 'videomae-nano', 'jepa-nano-short-supervised',
                                       'jepa-paper', 'videomae-paper', 'jepa-paper-supervised')},
    'mpp-nano': '--finetune 5 --finetune-lr 1e-3', 'mpp-paper': '--finetune paper',
    **{f'{model}-smoke': '--epochs 5' for model in ('jepa', 'videomae', 'disco')},
    'mpp-smoke': '--epochs 5 --finetune 1'}

PAPER_TABLES = {                                                         # their models, by preset
    'nano': ['jepa-nano-vicreg', 'videomae-nano', 'mpp-nano', 'disco-nano', 'jepa-nano-short-supervised'],
    'paper': ['jepa-paper', 'videomae-paper', 'mpp-paper', 'disco-paper', 'jepa-paper-supervised'],
    'smoke': ['jepa-smoke', 'videomae-smoke', 'mpp-smoke', 'disco-smoke']}
TARGETS = ['jepa-nano-paired', 'pixels-nano', 'jepa-nano-vicreg', 'jepa-nano-sigreg', 'jepa-nano-ema',
           'jepa-nano-infonce', 'jepa-nano-short-supervised', 'vjepa-nano-block', 'vjepa-nano-random',
           'vjepa-nano-temporal', 'videomae-nano', 'vjepa-nano-supervised']


def everywhere(rows, systems=tuple(system_names())):
    return [f'{system}-{row}' for system in systems for row in rows]


EXPERIMENT = everywhere(TARGETS, ('active_matter', 'shear_flow'))
GROUPS = {                                                               # by preset: {name of a part: its rows}
    'nano': {'longest': everywhere(['jepa-nano', 'jepa-nano-supervised']),
             'paper-tables': everywhere(PAPER_TABLES['nano']),
             'fewer-labels': everywhere(FEWER['nano']),
             'latents-or-pixels': EXPERIMENT},
    'paper': {'paper-tables': everywhere(PAPER_TABLES['paper']), 'fewer-labels': everywhere(FEWER['paper'])},
    'smoke': {'paper-tables': everywhere(PAPER_TABLES['smoke'])}}
