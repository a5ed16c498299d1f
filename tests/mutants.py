"""Automatic changes of a function's source, one at a time: what a careless student could write instead of the solution."""
import ast
import copy
import re

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
             ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISONS = {ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
               ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}


def changes(node):
    """Ways to change one node: each a function that takes the node's copy and returns what stands in its place."""
    def put(**fields):
        def change(n):
            for name, value in fields.items(): setattr(n, name, value)
            return n
        return change
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield put(op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for op in COMPARISONS.get(type(node.ops[0]), ()): yield put(ops=[op()])
    if isinstance(node, ast.BoolOp):
        yield put(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)): yield lambda n, i=i: n.values[i]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Invert, ast.Not, ast.USub)): yield lambda n: n.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for step in (1, -1): yield put(value=node.value + step)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool): yield put(value=not node.value)
    if isinstance(node, ast.Call):
        a = node.args
        for i in range(len(a) - 1):
            if ast.unparse(a[i]) != ast.unparse(a[i + 1]): yield put(args=[*a[:i], a[i + 1], a[i], *a[i + 2:]])
        if isinstance(node.func, ast.Attribute) and node.func.attr in ('detach', 'abs', 'sqrt', 'clone', 'mT', 'item', 'float'):
            yield lambda n: n.func.value
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) == 2: yield put(elts=node.elts[::-1])
    if isinstance(node, ast.With): yield lambda n: [*n.body]
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not isinstance(getattr(node, 'value', None), ast.Constant):
        yield lambda n: ast.Pass()


def replaced(tree, index, change):
    """A copy of the tree whose node number `index` (in walking order) is changed."""
    tree = copy.deepcopy(tree)
    target = list(ast.walk(tree))[index]
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, change(target))
                return tree
            if isinstance(value, list) and any(v is target for v in value):
                place = next(i for i, v in enumerate(value) if v is target)
                new = change(target)
                value[place:place + 1] = new if isinstance(new, list) else [new]
                return tree


def of(source):
    """(what was changed, the whole source) for each change, none twice and none equal to the source."""
    tree = ast.parse(source)
    first, seen = ast.unparse(tree).splitlines(), {ast.unparse(tree)}
    for index, node in enumerate(ast.walk(tree)):
        for change in list(changes(node)):
            new = ast.unparse(ast.fix_missing_locations(replaced(tree, index, change)))
            if new in seen: continue
            seen.add(new)
            lines = [line.strip() for line in new.splitlines() if line not in first]
            gone = [line.strip() for line in first if line not in new.splitlines()]
            yield (f'{gone[0] if gone else ""} -> {lines[0] if lines else "pass"}', new)
