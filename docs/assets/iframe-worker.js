// A page opened from a folder may start no Worker, and the search is one. Here it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = [] // what is sent before it listens
      if (document.body) this.begin(url)
      else addEventListener("DOMContentLoaded", () => this.begin(url))
    }

    begin(url) {
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.src = url
      script.onload = () => {
        this.postMessage = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
        this.waiting.forEach(this.postMessage)
      }
      inside.document.head.append(script)
    }

    postMessage(data) {
      this.waiting.push(data)
    }
  }
}
