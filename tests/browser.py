"""A Chromium without a window, driven over its DevTools protocol: what a reader's browser would do with a page."""
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from itertools import count
from pathlib import Path

PROGRAM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-dev-shm-usage', '--remote-debugging-port=0']
KEYS = dict(Tab=9, Enter=13, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40, End=35, Home=36, **{' ': 32})


class Browser:
    """One page at a time; `problems` are its errors and the addresses that it asked for beside its own."""

    def __init__(self, folder):
        from websocket import create_connection  # comes with Jupyter's server
        self.process = subprocess.Popen([PROGRAM, *FLAGS, f'--user-data-dir={folder}', 'about:blank'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.numbers, self.problems, self.address, self.socket = count(1), [], 'about:blank', None
        try:
            pages = json.load(urllib.request.urlopen(f'http://127.0.0.1:{self.port(folder)}/json/list'))
            address = next(p['webSocketDebuggerUrl'] for p in pages if p['type'] == 'page')
            self.socket = create_connection(address, timeout=120, suppress_origin=True)
            for domain in ('Page', 'Runtime', 'Network', 'Log'):
                self.send(f'{domain}.enable')
        except BaseException:
            self.close()
            raise

    def port(self, folder):
        """Where it listens: it writes that down when it has started."""
        file = Path(folder)/'DevToolsActivePort'
        for _ in range(600):
            if file.exists() and file.read_text().count('\n'):
                return file.read_text().split()[0]
            if self.process.poll() is not None:
                raise RuntimeError(f'{PROGRAM} ended with exit code {self.process.returncode} before it listened')
            time.sleep(.1)
        raise RuntimeError(f'{PROGRAM} does not listen after a minute')

    def close(self):
        if self.socket:
            self.socket.close()
        self.process.terminate()
        self.process.wait(20)

    def send(self, method, **params):
        """Call a method of the protocol; its result. What happens meanwhile is noted."""
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get('id') == number:
                assert 'error' not in message, message
                return message['result']
            self.note(message.get('method'), message['params'])

    def note(self, event, params):
        if event == 'Runtime.exceptionThrown':
            details = params['exceptionDetails']
            self.problems.append(details.get('exception', {}).get('description', details['text']))
        elif event == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
            self.problems.append(f"console: {[a.get('value') for a in params['args']]}")
        elif event == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
            self.problems.append(f"log: {params['entry']['text']}")
        elif event == 'Network.requestWillBeSent' and not params['request']['url'].startswith(('data:', self.address)):
            self.problems.append(f"asks for {params['request']['url']}")

    def open(self, path, width=1000, height=900):
        """Open a file at a width, and wait until it has loaded."""
        self.problems, self.address = [], Path(path).resolve().as_uri()
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send('Page.navigate', url=self.address)
        self.wait(f'document.readyState == "complete" && location.href == {json.dumps(self.address)}')
        return self

    def run(self, script):
        """The value of a JavaScript expression on the page."""
        answer = self.send('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def wait(self, script):
        """Until a JavaScript expression is true: a browser draws when it gets to it, on a busy machine late."""
        for _ in range(600):
            if self.run(script): return
            time.sleep(.05)
        raise AssertionError(f'after half a minute still false: {script}')

    def press(self, *keys):
        """Press keys, one after the other, wherever the focus is."""
        for key in keys:
            what = dict(key=key, code='Space' if key == ' ' else key, windowsVirtualKeyCode=KEYS[key])
            text = dict(text={' ': ' ', 'Enter': '\r'}[key]) if key in (' ', 'Enter') else {}
            self.send('Input.dispatchKeyEvent', type='keyDown', **what, **text)
            self.send('Input.dispatchKeyEvent', type='keyUp', **what)

    def click(self, element, x=.5, y=.5):
        """Click into an element (a JavaScript expression), at shares of its width and height."""
        box = self.run(f'(e => {{ e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect(); '
                       f'return [b.left, b.top, b.width, b.height]; }})({element})')
        place = dict(x=box[0] + x * box[2], y=box[1] + y * box[3], button='left', clickCount=1)
        for kind in ('mousePressed', 'mouseReleased'):
            self.send('Input.dispatchMouseEvent', type=kind, **place)

    def picture(self, path):
        """A PNG of the whole page."""
        shot = self.send('Page.captureScreenshot', captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot['data']))
