// What snippets of the documents take for granted.
import type { SupabaseClient } from '@supabase/supabase-js'
import type { Autotag } from 'supabase-autotag'
import type { Database } from '../../supabase/types/database.js'

/** The functions that docs/frontend.md adds to a project. */
type Added = {
  images_with_tags: { Args: { workspace_id: string, wanted: string[] }, Returns: Database['public']['Tables']['assets']['Row'][] }
  tag_counts: { Args: { workspace_id: string, with_tags?: string[], beginning?: string }, Returns: { tag: string, images: number }[] }
}
type Public = Database['public']
type Extended = { public: Omit<Public, 'Functions'> & { Functions: Public['Functions'] & Added } }

declare global {
  type Row = Database['public']['Tables']['assets']['Row']
  const supabase: SupabaseClient<Extended>
  /** A client with the secret key. */
  const admin: SupabaseClient<Database>
  const autotag: Autotag<SupabaseClient<Database>>
  const ids: string[]
  const asset: Row
  const job_id: string
  const batch_id: string
  const webhook_id: string
  const workspace_id: string
  const workspaceId: string
  const typed: string
  const files: File[]
  const supabaseUrl: string
  const publishableKey: string
  function show(value: unknown): void
  function complain(text: string): void
  function refetchAssets(assetIds?: string[] | null): void
}
