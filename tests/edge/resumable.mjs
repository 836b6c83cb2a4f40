// The real tus-js-client uploads to the edge. Arguments: JSON with {endpoint, token, bucket, folder}. Prints what it was answered.
import { Upload } from 'tus-js-client'

const given = JSON.parse(process.argv[2])
const seen = {}

/** Uploads bytes under a name; resolves with the upload when it has ended, however it has. */
function upload(name, size, options = {}) {
  const answers = seen[name] ??= []
  return new Promise((resolve) => {
    const one = new Upload(Buffer.alloc(size, name), {
      endpoint: given.endpoint, headers: { authorization: `Bearer ${given.token}` }, chunkSize: 4000, retryDelays: null,
      metadata: { bucketName: given.bucket, objectName: `${given.folder}/${name}`, contentType: 'image/png', cacheControl: '60' },
      onAfterResponse: (request, response) => {
        answers.push([request.getMethod(), response.getStatus(), response.getHeader('Upload-Offset') ?? null])
      },
      onError: (error) => resolve({ one, error: error.originalResponse?.getBody() || String(error) }),
      onSuccess: () => resolve({ one }),
      ...options,
      onChunkComplete: (...chunk) => options.onChunkComplete?.(one, resolve, ...chunk),
    })
    one.start()
  })
}

const stop = { onChunkComplete: (one, resolve) => { one.abort(); resolve({ one }) } }
await upload('plain', 10_000)
await upload('at-once', 3000, { uploadDataDuringCreation: true })
const { one } = await upload('resumed', 10_000, stop)
await upload('resumed', 10_000, { uploadUrl: one.url })
const again = await upload('resumed', 10_000)
const { one: dropped } = await upload('dropped', 10_000, stop)
await dropped.abort(true)
const gone = await upload('dropped', 10_000, { uploadUrl: dropped.url, endpoint: null })
console.log(JSON.stringify({ seen, again: again.error, gone: Boolean(gone.error) }))
