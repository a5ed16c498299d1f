"""nbs/54_figures and the pictures in nbs/images/course, from the figures that the pages store: `make exercises`."""
import base64
import re

import exercises

FOLDER = exercises.ROOT/'nbs/images/course'
TOP = '''# Figures for a class

> Fourteen pictures of this book, each with its caption and a question to ask before you explain it.'''
INTRODUCTION = '''**Goals.** Have something to put on the wall, in the order of the course. **You need.** Nothing.

Each picture is stored by the page that it names, and is drawn by the code there. The files are in the folder
`nbs/images/course` of the repository. Use them as you like, under the book's license (BSD, two clauses), and name the page.'''
FIGURES = (  # page, cell, name of the file, heading, question
    ('01_start', 'e1d16fa0', 'method', 'The whole method',
     'Two encoders, one loss. Which weights does the gradient reach, and how do the others change?'),
    ('10_masking', '94c29d4b', 'blocks', 'A mask made of blocks',
     'The count must be exact. What would the last rectangle do if nothing were refused?'),
    ('10_masking', 'cd80cbb4', 'ratio', 'How much to hide',
     'Where would you set the ratio, and what keeps you from going farther to the left or right?'),
    ('11_sparse', 'e0fa48ac', 'leak', 'The mask wears away',
     'The image was masked. Where do the white positions come from, and why does it matter?'),
    ('12_tokenizer', 'a7edac37', 'field', 'What a token reads',
     'Which of the two tokens would notice that a flower has moved by one pixel?'),
    ('13_encoder', '55f86f44', 'scale', 'Why attention is divided by √d',
     'The keys are random. Why does a wide head choose one of them all the same?'),
    ('14_predictor', '3fcdc5e9', 'guess', 'The best guess at a coin',
     'Red or blue, by the toss of a coin. What should a network draw that is punished for the squared error?'),
    ('15_jepa', '986f6acb', 'collapse', 'A low loss that is bad',
     'The run with the lowest loss is the worst. Which number would have told you?'),
    ('22_schedule', '8889a897', 'average', 'What the moving average does',
     'What does a larger momentum buy, and what does it cost?'),
    ('30_probes', 'f56df212', 'choice', 'Chosen on the test split',
     'All settings toss coins. Where do the eight points come from?'),
    ('31_health', '33170866', 'signs', 'Signs of sick runs',
     'Cover the titles. Which curve betrays which fault?'),
    ('32_visualize', '0375e355', 'colors', 'Features as colors',
     'Cover the titles. Which column has been trained? What would you want to see beside it before you say so?'),
    ('32_visualize', '6913bafb', 'attention', 'Attention maps',
     'One head seems to find the flower. How many images would you count before you believe it?'),
    ('01_start', '1471c9d4', 'result', 'What was learned',
     'Three minutes or hours: which gray bar is the one to beat, and is it beaten?'))


def figure(page, cell):
    """A stored figure: its picture as bytes, its caption and what it shows."""
    nb = exercises.read(exercises.ROOT/f'nbs/{page}.ipynb')
    found = next(c for c in nb['cells'] if c['id'] == cell)
    picture = next(o['data']['image/png'] for o in found['outputs'] if 'image/png' in o.get('data', {}))
    words = [re.search(rf'^#\| {name}: "(.*)"$', found['source'], re.M)[1] for name in ('fig-cap', 'fig-alt')]
    return base64.b64decode(''.join(picture)), *words, nb['cells'][0]['source'].splitlines()[0].strip('# ')


def pictures():
    """{file: its bytes}."""
    return {f'{name}.png': figure(page, cell)[0] for page, cell, name, *_ in FIGURES}


def page():
    """The page, as a notebook."""
    course = exercises.read(exercises.ROOT/'nbs/50_course.ipynb')
    cells = [TOP, course['cells'][1]['source'].replace('50_course', '54_figures'), INTRODUCTION]
    for place, cell, name, heading, question in FIGURES:
        _, caption, alt, title = figure(place, cell)
        cells.append(f'## {heading}\n\n*{question}*\n\n![{alt}](images/course/{name}.png)\n\n{caption} '
                     f'From [{title}]({place}.ipynb).')
    cells = [exercises.cell('markdown', text) for text in cells]
    return dict(cells=cells, metadata=course['metadata'], nbformat=4, nbformat_minor=5)


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures().items():
        (FOLDER/name).write_bytes(picture)
    (exercises.ROOT/'nbs/54_figures.ipynb').write_text(exercises.written(page()), encoding='utf-8')


if __name__ == '__main__':
    main()
