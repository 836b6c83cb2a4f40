// Sends files to Storage so that a bad connection costs only time (docs/frontend.md, "Uploading on a bad connection").
// It uses tus-js-client, unmodified, and no other part of the page.
//
// A file's name in Storage is the hash of its content. So the same photo has the same name, and Storage takes it once: after a double
// click, in two windows, after a reload, and when the reply to the last request was lost.

const CHUNK = 6 * 1024 * 1024 // bytes; Storage asks for exactly this
const SMALL = 64 * 1024 // bytes; such a file is sent in the request that creates its upload, and is not worth resuming
const RETRY_DELAYS = [0, 1000, 2000, 5000, ...Array(10_000).fill(10_000)] // milliseconds; it never gives up while the page is open
const STALLED = 60_000 // milliseconds without a byte: the connection is dead, even if the browser does not know yet

/** Storage has an object of this name. */
const exists = (error) => error.originalResponse?.getStatus() === 409 && /already exists/i.test(error.originalResponse.getBody())

/** Whether another try can succeed. Storage answers 409 if the offset is wrong, 410 if the upload has expired. */
function passes(error) {
  const status = error.originalResponse?.getStatus() ?? 0
  return status === 0 || status >= 500 || [408, 409, 410, 423, 429].includes(status) && !exists(error)
}

/** Why a file cannot be uploaded, for people. */
function explain(error) {
  const status = error.originalResponse?.getStatus()
  if (status === 413) return 'The file is larger than this project allows.'
  if (status === 415) return 'This project does not take files of this kind.'
  if (status === 403) return 'You may not upload to this workspace.'
  if (status && /unauthorized|jwt/i.test(error.originalResponse.getBody())) return 'Your session has ended. Sign in and choose the files again.'
  if (status) return `Storage refused the file: ${error.originalResponse.getBody().trim().slice(0, 200) || status}`
  return 'The file cannot be read. It may have been moved: choose it again.'
}

async function hash(file) {
  const digest = await crypto.subtle.digest('SHA-256', await file.arrayBuffer())
  return [...new Uint8Array(digest).slice(0, 16)].map((byte) => byte.toString(16).padStart(2, '0')).join('')
}

/**
 * Sends one file, and tries again for as long as the page is open.
 *
 * @param {File} file
 * @param {object} to {url: of the project, key: publishable or anon, token: async () => the user's JWT, bucket, folder}
 * @param {object} callbacks {progress(share: 0 to 1), waiting(): the connection is broken, signal: ends the upload}
 * @returns {Promise<{path: string, there: boolean}>} there: Storage had this file before
 * @throws {Error} with a message for people; an AbortError if the signal ended it
 */
export async function storeFile(file, to, callbacks) {
  let path
  try {
    path = `${to.folder}/${await hash(file)}${file.name.match(/\.\w{1,5}$/)?.[0].toLowerCase() ?? ''}`
  } catch (error) {
    throw new Error(explain(error))
  }
  // All windows see the same unfinished uploads. One window at a time continues an upload.
  return navigator.locks.request(`upload:${path}`, { signal: callbacks.signal }, () => send(file, path, to, callbacks))
}

function send(file, path, to, { progress, waiting, signal }) {
  return new Promise((resolve, reject) => {
    let stalled
    const upload = new window.tus.Upload(file, {
      endpoint: `${to.url}/storage/v1/upload/resumable`,
      chunkSize: CHUNK,
      uploadDataDuringCreation: file.size <= SMALL,
      headers: { apikey: to.key },
      metadata: { bucketName: to.bucket, objectName: path, contentType: file.type, cacheControl: '3600' },
      fingerprint: async () => `upload:${path}`,
      removeFingerprintOnSuccess: true,
      retryDelays: RETRY_DELAYS,
      // an upload may take longer than a token lives
      onBeforeRequest: async (request) => request.setHeader('authorization', `Bearer ${await to.token()}`),
      onProgress: (sent, size) => { watch(); progress(size ? sent / size : 1) },
      onShouldRetry: (error) => {
        if (!passes(error)) return false
        waiting()
        file.slice(0, 1).arrayBuffer().catch((unread) => { upload.abort(); end(reject, new Error(explain(unread))) })
        return true
      },
      onSuccess: () => end(resolve, { path, there: false }),
      onError: (error) => exists(error) ? end(resolve, { path, there: true }) : end(reject, new Error(explain(error))),
    })
    const again = () => { watch(); upload.abort().then(() => upload.start()) }
    const stop = () => { upload.abort(); end(reject, signal.reason) }
    function watch() {
      clearTimeout(stalled)
      stalled = setTimeout(() => { waiting(); again() }, STALLED)
    }
    function end(settle, value) {
      clearTimeout(stalled)
      removeEventListener('online', again)
      signal.removeEventListener('abort', stop)
      settle(value)
    }
    addEventListener('online', again)
    signal.addEventListener('abort', stop)
    upload.findPreviousUploads().then((previous) => {
      if (signal.aborted) return
      if (previous.length) upload.resumeFromPreviousUpload(previous.at(-1))
      again()
    })
  })
}
