"""
Does everything run? The whole pipeline in a minute: python smoke.py [--data NAME] [--model NAME]

Simulates a miniature of the nano data, trains twenty steps and evaluates, in a temporary folder that is removed
again. The numbers in its table mean nothing.
"""
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import option, parse, script

import eval as evaluation
import model as models
import simulate
import systems
import train


@dataclass
class Settings:
    data: str = option(systems.DEFAULT, 'system: ' + ', '.join(systems.system_names()), 'what')
    model: str = option(models.DEFAULT, ', '.join(models.model_names()), 'what')


@script
def main(argv=None):
    args, = parse(__doc__, Settings, argv)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for step, flags in ((simulate, [args.data, '--preset', 'smoke', '--data-dir', 'data']),
                                (train, ['--data', args.data, '--model', args.model, '--data-dir', 'data']),
                                (evaluation, ['--epochs', '10', '--data-dir', 'data'])):
                print(f'\n$ python {Path(step.__file__).name} {" ".join(flags)}', flush=True)
                step.main(flags)
        finally:
            os.chdir(here)


if __name__ == '__main__':
    main()
