import type { SupabaseClient } from '@supabase/supabase-js'
import type { Database } from './database'

export const COLUMNS = 'id, created_at, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags'
type Row = Database['public']['Tables']['assets']['Row']
export type Image = Pick<Row, 'id' | 'created_at' | 'storage_path' | 'tagging_stage' | 'tagging_progress' | 'tagging_eta' | 'tagging_error' | 'tags'>

/** A list of texts as Postgres writes it. */
export const quote = (tags: readonly string[]): string => `{${tags.map((tag) => `"${tag.replace(/["\\]/g, '\\$&')}"`).join()}}`

/** Stores files in the workspace's folder. The database inserts the rows with them. */
export async function upload(supabase: SupabaseClient<Database>, workspaceId: string, files: readonly File[]): Promise<Image[]> {
  return await Promise.all(files.map(async (file) => {
    const path = `${workspaceId}/${crypto.randomUUID()}`
    const { error } = await supabase.storage.from('assets').upload(path, file, { contentType: file.type })
    if (error) throw error
    const { data } = await supabase.from('assets').select(COLUMNS).eq('storage_bucket', 'assets').eq('storage_path', path).single().throwOnError()
    return data
  }))
}

/**
 * Writes `change(tags)`, and returns the row as it is then. The update holds only for the list that was read. If a run or another
 * window has changed it meanwhile, the edit is made again, to the newer list.
 */
export async function editTags(
  supabase: SupabaseClient<Database>, image: Image, change: (tags: string[]) => string[], attempts = 5,
): Promise<Image> {
  const update = supabase.from('assets').update({ tags: change(image.tags ?? []) }).eq('id', image.id)
  const { data } = await (image.tags ? update.filter('tags', 'eq', quote(image.tags)) : update.is('tags', null)).select(COLUMNS).throwOnError()
  if (data[0]) return data[0]
  const { data: current } = await supabase.from('assets').select(COLUMNS).eq('id', image.id).single().throwOnError()
  if (!attempts) throw new Error('You may not change the tags of this image, or they keep changing.')
  return await editTags(supabase, current, change, attempts - 1)
}
