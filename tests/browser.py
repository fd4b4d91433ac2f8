"A real browser for tests: headless Chromium, driven through its DevTools protocol."
import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    "One page of a headless Chromium. `errors` collects exceptions and console errors, `calls` what `toPython` is called with."

    def __init__(self, profile: Path):
        import websocket

        self.errors = []
        self.calls = []
        self._numbers = itertools.count(1)
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"]
        words += ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen([CHROMIUM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.exists() and len(port_file.read_text().splitlines()) > 1):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError("Chromium did not start")
            time.sleep(0.05)
        port, address = port_file.read_text().splitlines()[:2]
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{address}", timeout=60, max_size=None)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Runtime.addBinding", name="toPython")

    def send(self, method: str, **parameters) -> dict:
        "Call a method of the protocol and wait for its answer."
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session := getattr(self, "session", None):
            message["sessionId"] = session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            self._note(answer)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _note(self, event: dict) -> None:
        "Remember an error of the page."
        found = event.get("params", {})
        if event.get("method") == "Runtime.bindingCalled":
            self.calls.append(json.loads(found["payload"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(found["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and found["type"] in ("error", "assert"):
            self.errors.append(str(found["args"]))
        elif event.get("method") == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(found["entry"]["text"] + " " + found["entry"].get("url", ""))

    def js(self, expression: str):
        "The value of a JavaScript expression; a promise is awaited."
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20):
        "Wait until a JavaScript expression is true, and return its value."
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)
        return value

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        "Load a page in a window of this size."
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'", 60)

    def mouse(self, kind: str, x: float, y: float) -> None:
        "A mouse event: pressed, moved or released."
        pressed = kind != "released"
        button = {"button": "left", "buttons": int(pressed), "clickCount": 1} if kind != "hover" else {}
        name = "mouseMoved" if kind in ("moved", "hover") else f"mouse{kind.capitalize()}"
        self.send("Input.dispatchMouseEvent", type=name, x=x, y=y, **button)

    def place(self, selector: str) -> tuple[float, float, float, float]:
        "Left, top, width and height of an element, which is scrolled into view."
        find = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{find}.scrollIntoView({{block: 'center'}})")
        return tuple(self.js(f"(r => [r.x, r.y, r.width, r.height])({find}.getBoundingClientRect())"))

    def hover(self, selector: str) -> None:
        x, y, width, height = self.place(selector)
        self.mouse("hover", x + width / 2, y + height / 2)

    def click(self, selector: str) -> None:
        x, y, width, height = self.place(selector)
        for kind in ("pressed", "released"):
            self.mouse(kind, x + width / 2, y + height / 2)

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 5) -> None:
        "Press at one point, move, and release at another."
        self.mouse("pressed", *start)
        for step in range(1, steps + 1):
            self.mouse("moved", *(a + (b - a) * step / steps for a, b in zip(start, end)))
        self.mouse("released", *end)

    def key(self, name: str) -> None:
        "Press and release a key."
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=KEYS[name])

    def screenshot(self, file: str | Path, whole: bool = True) -> None:
        "Save a picture of the page."
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        "End this browser and its processes."
        if hasattr(self, "socket"):
            self.socket.close()
        try:
            os.killpg(self.process.pid, 15)
        except ProcessLookupError:
            pass
        self.process.wait(timeout=30)
