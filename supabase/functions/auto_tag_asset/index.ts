// For clients that still call an edge function for every image and cannot be changed at once. It enqueues the images as the
// calling user, and returns at once. Deploy: supabase functions deploy auto_tag_asset
// Takes {asset_id} or {asset_ids} (or assetId, assetIds); returns the result of enqueue_tagging.
import { createClient } from '@supabase/supabase-js'

const MAX_BODY = 2_000_000 // bytes: 50,000 ids
const CORS = {
  'access-control-allow-origin': '*',
  'access-control-allow-headers': 'authorization, x-client-info, apikey, content-type',
}

const env = (name: string) => Deno.env.get(name) ?? ''
// Newer projects pass the publishable key in SUPABASE_PUBLISHABLE_KEYS, a JSON object of names and keys.
const keys = JSON.parse(env('SUPABASE_PUBLISHABLE_KEYS') || '{}') as Record<string, string>
const key = keys.default ?? env('SUPABASE_ANON_KEY')

const answer = (status: number, body: unknown) => Response.json(body, { status, headers: CORS })
const refuse = (status: number, code: string, message: string) => answer(status, { error: { code, message } })

/** The body as text, or null if it is too large. The headers are not trusted for this. */
async function read(request: Request): Promise<string | null> {
  if (Number(request.headers.get('content-length') ?? 0) > MAX_BODY) return null
  const chunks: Uint8Array[] = []
  let size = 0
  for await (const chunk of request.body ?? []) {
    size += chunk.length
    if (size > MAX_BODY) return null
    chunks.push(chunk)
  }
  return new TextDecoder().decode(await new Blob(chunks as BlobPart[]).arrayBuffer())
}

/** The value of a JSON text, or null if it is not valid JSON. */
function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}

/** The ids in a body, or null if it has none. A number above 2^53 has lost digits in JSON.parse; send such ids as strings. */
function readIds(body: unknown): (string | number)[] | null {
  if (typeof body !== 'object' || body === null) return null
  const { asset_id, assetId, asset_ids, assetIds } = body as Record<string, unknown>
  const ids = asset_ids ?? assetIds ?? [asset_id ?? assetId]
  return Array.isArray(ids) && ids.length > 0 && ids.every((id) => typeof id === 'string' || Number.isSafeInteger(id))
    ? ids
    : null
}

export async function handle(request: Request): Promise<Response> {
  if (request.method === 'OPTIONS') return new Response(null, { status: 204, headers: CORS })
  if (request.method !== 'POST') return refuse(405, 'method_not_allowed', 'Send a POST request with {"asset_id": "…"}.')
  const authorization = request.headers.get('authorization')
  if (!authorization) return refuse(401, 'not_signed_in', 'Call this as a signed-in user.')
  const body = await read(request)
  if (body === null) return refuse(413, 'too_large', 'The body is too large: at most 50,000 ids fit.')
  const ids = readIds(parse(body))
  if (!ids) return refuse(400, 'no_asset', 'The body must be {"asset_id": "…"} or {"asset_ids": ["…"]}.')
  const supabase = createClient(env('SUPABASE_URL'), key, {
    global: { headers: { Authorization: authorization } },
    auth: { persistSession: false },
  })
  const { data, error, status } = await supabase.rpc('enqueue_tagging', { asset_ids: ids })
  if (error) return answer(status || 502, { error })
  return answer(202, data)
}

if (import.meta.main) Deno.serve(handle)
