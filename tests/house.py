"""How large is the house, and has its code paragraphs?  python tests/house.py"""
import ast
import io
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
NOT_OURS = {'.venv', 'venv', 'data', 'out', 'rows', 'build'}
TOP, LINES, COLUMNS, STRETCH, WORDS = 14, 8015, 100, 8, 1200


def python_files():
    """All of them, without virtual environments and the like."""
    return [p for p in sorted(HERE.rglob('*.py')) if not NOT_OURS & set(p.relative_to(HERE).parts)]


def sources():
    """Those that are no tests."""
    return [p for p in python_files() if p.name != 'test_all.py' and p.parent.name != 'tests']


def long_stretches(path):
    """'file:line name' of each stretch of over 8 lines without a comment or blank line, in functions of over 12."""
    text, found = path.read_text(), []
    lines, tree = text.split('\n'), ast.parse(text)
    pauses = {i for i, line in enumerate(lines, 1) if not line.strip()}
    pauses |= {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline)
               if token.type == tokenize.COMMENT}
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in functions:                                               # a docstring is a comment
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            pauses |= set(range(first.lineno, first.end_lineno + 1))
    for node in functions:
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 12:
            run = 0
            for i in range(node.body[0].lineno, node.end_lineno + 1):
                run = 0 if i in pauses else run + 1
                if run == STRETCH + 1:
                    found.append(f'{path.relative_to(HERE)}:{i} {node.name}')
    return found


def named_lambdas(path):
    """'file:line' of each lambda that is given a name."""
    return [f'{path.relative_to(HERE)}:{node.lineno}' for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]


def count():
    """{what is counted: (number, the most it may be, where)}."""
    wide = [f'{p.relative_to(HERE)}:{i}' for p in sources()
            for i, line in enumerate(p.read_text().split('\n'), 1) if len(line) > COLUMNS]
    stretches = [where for p in sources() for where in long_stretches(p)]
    lambdas = [where for p in sources() for where in named_lambdas(p)]
    top = [p.name for p in HERE.glob('*.py')]
    return {
        'Python files at top level': (len(top), TOP, top),
        'lines of source': (sum(p.read_text().count('\n') for p in sources()), LINES, []),
        f'lines over {COLUMNS} columns': (len(wide), 0, wide),
        f'stretches of over {STRETCH} lines without a pause': (len(stretches), 0, stretches),
        'lambdas with a name': (len(lambdas), 0, lambdas),
        'words in README': (len((HERE / 'README.md').read_text().split()), WORDS, [])}


if __name__ == '__main__':
    for what, (number, most, where) in count().items():
        print(f'{number:6} {what} (at most {most})', '' if number <= most else '\n         ' + '\n         '.join(where))
