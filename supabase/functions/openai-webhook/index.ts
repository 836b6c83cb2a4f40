// For projects whose workers have no public address. It verifies a delivery of OpenAI's webhook and passes it to the database,
// which makes the workers poll OpenAI at once.
// Deploy: supabase functions deploy openai-webhook --no-verify-jwt   (OpenAI sends no JWT; the signature is verified)
// Secrets: supabase secrets set OPENAI_WEBHOOK_SECRET=whsec_…   (the project's URL and key are set already)
import { createClient } from '@supabase/supabase-js'
import OpenAI from 'openai'

const MAX_BODY = 65_536 // bytes; OpenAI's deliveries have a few hundred

const env = (name: string) => Deno.env.get(name) ?? ''
const secret = env('OPENAI_WEBHOOK_SECRET')
const MIN_KEY = 16 // bytes, as the worker requires: deliveries can be forged with a secret that can be guessed
// Newer projects pass the secret key in SUPABASE_SECRET_KEYS, a JSON object of names and keys.
const keys = JSON.parse(env('SUPABASE_SECRET_KEYS') || '{}') as Record<string, string>
const supabase = createClient(env('SUPABASE_URL'), keys.default ?? env('SUPABASE_SERVICE_ROLE_KEY'), {
  auth: { persistSession: false },
})
const { webhooks } = new OpenAI({ apiKey: 'not used: no API call is made here' })

const refuse = (status: number, code: string, message: string) =>
  Response.json({ error: { code, message } }, { status })

/** Whether a text has the form of OpenAI's secrets: whsec_ and a key in base64. */
function isSecret(text: string): boolean {
  try {
    return text.startsWith('whsec_') && atob(text.slice(6)).length >= MIN_KEY
  } catch {
    return false
  }
}

/** The body as text, or null if it is larger than any delivery. The headers are not trusted for this. */
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

export async function handle(request: Request): Promise<Response> {
  if (request.method !== 'POST') {
    return refuse(405, 'method_not_allowed', 'Send a delivery of OpenAI as a POST request.')
  }
  if (!secret) return refuse(500, 'no_secret', 'OPENAI_WEBHOOK_SECRET is not set.')
  if (!isSecret(secret)) {
    return refuse(
      500,
      'bad_secret',
      "OPENAI_WEBHOOK_SECRET does not have the form that OpenAI's settings show (whsec_…).",
    )
  }
  const body = await read(request)
  if (body === null) return refuse(413, 'too_large', 'The body is larger than any delivery of OpenAI.')
  let event: { type: string; data?: { id?: string } }
  try {
    event = await webhooks.unwrap(body, request.headers, secret) as typeof event
  } catch (error) {
    return refuse(400, 'bad_signature', error instanceof Error ? error.message : 'This is not a delivery of OpenAI.')
  }
  const { data, error } = await supabase.rpc('openai_webhook', {
    webhook_id: request.headers.get('webhook-id'),
    event_type: event.type,
    batch_id: event.data?.id ?? '',
  })
  // OpenAI repeats deliveries that get an error.
  if (error) return refuse(502, 'database', error.message)
  console.log(JSON.stringify({ event: 'webhook', event_type: event.type, openai_batch: event.data?.id, ...data }))
  return new Response(null, { status: 204 })
}

if (import.meta.main) Deno.serve(handle)
